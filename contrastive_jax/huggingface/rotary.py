"""Rotary positions and the order of local and global layers, as a config.json says them."""

from typing import Any

from contrastive_jax.config import UserError


def check_rope(config: dict[str, Any], *parameters: dict[str, Any]) -> None:
    """Checks that the rotary positions of a config.json are plain ones.

    Raises:
      UserError: they are scaled, for longer texts.
    """
    older = config.get("rope_scaling") or {}
    for values in (*parameters, older):
        kind = values.get("rope_type") or values.get("type") or "default"
        if kind != "default":
            raise UserError(f"config.json: rope_type={kind!r}; this encoder knows 'default', so choose another model")


def read_global_every(config: dict[str, Any]) -> int:
    """Returns n of a ModernBERT of which layers 0, n, 2n, ... are global.

    Raises:
      UserError: its `layer_types` have another order.
    """
    kinds = config.get("layer_types")
    if kinds is None:
        return int(config.get("global_attn_every_n_layers", 3))
    is_global = [kind == "full_attention" for kind in kinds]
    for n in range(1, len(kinds) + 1):
        if is_global == [number % n == 0 for number in range(len(kinds))]:
            return n
    raise UserError(f"config.json: layer_types={kinds}; this encoder has global layers at 0, n, 2n, ... alone")
