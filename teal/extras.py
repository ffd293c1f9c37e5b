"""What a family has beyond a plain model. Kernels that do not compute it must refuse it by these names."""

from teal.model import ModelConfig


def block_extras(config: ModelConfig) -> list[str]:
    """Within a block whose cos and sin are given; a plain one has pre-norms and silu."""
    found = {
        f"activation {config.activation}": config.activation != "silu",
        "sublayers without a norm before": not config.pre_norm,
        "norms after sublayers": config.post_norm,
        "norms of q and k over all heads": config.qk_norm_full,
        "a soft cap of attention scores": config.attention_softcap is not None,
    }
    return [name for name, has_it in found.items() if has_it]


def extras(config: ModelConfig) -> list[str]:
    """Within blocks and around them; a plain model has one rotation, and nothing is capped or scaled."""
    scaling = config.rope_scaling
    found = {
        "a scaled embedding": config.embedding_scale != 1,
        "a soft cap of logits": config.logit_softcap is not None,
        "rotations that differ by layer": len(set(config.ropes())) > 1,
        "a factor of cos and sin": scaling is not None and scaling.attention_factor != 1,
    }
    return block_extras(config) + [name for name, has_it in found.items() if has_it]
