"""From text to a sparsity plan: histograms of inputs, thresholds, allocation, the published plans.

Import `thresholds` to calibrate a model in memory, `texts` for tokens to do it on,
`choose` for the plan that a model gets.
"""
