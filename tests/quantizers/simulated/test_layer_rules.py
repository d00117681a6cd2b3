"""Targets by kind and half: the first rule that fits decides."""

from quantizers.simulated.layer_rules import LayerRule, target_bits

RULES = [LayerRule(5.0, "self_attn"), LayerRule(3.5, "mlp", "first"), LayerRule(4.5, half="second")]


def test_the_first_rule_that_fits_decides() -> None:
    def found(tensor: str, block: int) -> float:
        return target_bits(RULES, tensor, block, 5, 4.0)

    assert found("model.layers.4.self_attn.q_proj.weight", 4) == 5.0
    assert found("model.layers.2.mlp.up_proj.weight", 2) == 3.5, "the middle block of five is in the first half"
    assert found("model.layers.3.mlp.up_proj.weight", 3) == 4.5
    assert found("model.embed_tokens.weight", -1) == 4.0 == found("lm_head.weight", 5)
