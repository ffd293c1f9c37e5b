"""A program for vLLM's environment: greedy tokens after some ids, and how likely these were, as one line of JSON.

    python -m tests.vllm_plugin.texts FOLDER IDS TOKENS OPTIONS

IDS is a JSON list of token ids, OPTIONS a JSON object of further arguments of vLLM's LLM.
"""

import json
import sys

if __name__ == "__main__":  # vLLM's workers import it, too
    from vllm import LLM, SamplingParams

    folder, ids, tokens, options = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4])
    llm = LLM(model=folder, quantization="teal", dtype="float32", max_model_len=256, **options)
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, prompt_logprobs=0, detokenize=False)
    result = llm.generate({"prompt_token_ids": ids}, params, use_tqdm=False)[0]
    likely = [step[token].logprob for step, token in zip(result.prompt_logprobs[1:], ids[1:], strict=True)]
    print("\n" + json.dumps({"tokens": list(result.outputs[0].token_ids), "logprobs": likely}))
