"""Every rule that a table may name."""

from __future__ import annotations

from shardtool.layouts import experts, latent, packed, rules

RULES: dict[str, rules.Rule] = {**rules.RULES, **experts.RULES, **latent.RULES, **packed.RULES}
