"""vLLM's way to the plugin: the entry point that it calls in each of its processes."""

import logging
import re

VERSIONS = ((0, 20), (0, 32))  # of vLLM: the oldest that will do, and the newest that was tried

logger = logging.getLogger("vllm.teal")


def register() -> None:
    """Make `teal` a quantization method of vLLM. A version that is too old is left as it is, with a warning.

    It may be called several times.
    """
    import vllm

    match = re.match(r"(\d+)\.(\d+)", vllm.__version__)
    found = (int(match[1]), int(match[2])) if match else VERSIONS[1]  # one built from its sources
    oldest, newest = (".".join(map(str, version)) for version in VERSIONS)
    if found < VERSIONS[0]:
        logger.warning("teal: vLLM %s is not supported; expected %s to %s", vllm.__version__, oldest, newest)
        return
    if found > VERSIONS[1]:
        logger.warning("teal: vLLM %s is newer than %s, the newest that was tried", vllm.__version__, newest)
    from vllm.model_executor.layers.quantization import register_quantization_config

    from teal.layers.quantized_linear import QUANT_METHOD
    from teal.vllm_plugin.config import TealConfig

    register_quantization_config(QUANT_METHOD)(TealConfig)
