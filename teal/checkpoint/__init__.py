"""From what a user names to a model with its tokenizer: files, hubs, families, formats, chat templates.

Import `loading` for a whole model, `weights` and `config` for its parts; knows nothing of calibration or decoding.
"""
