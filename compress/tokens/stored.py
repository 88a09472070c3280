"""The token policy that a checkpoint carries in its config, and a model loaded from one."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from compress.checkpoint import TOKENS
from compress.errors import BadInput
from compress.tokens.engine import attach
from compress.tokens.hooks import Engine
from compress.tokens.policy import TokenPolicy

_logger = logging.getLogger(__name__)


def stored_policy(config: Any) -> TokenPolicy | None:
    """What a config, as a mapping or transformers', says of tokens; None where it says nothing.

    Raises `BadInput` for what is no policy.
    """
    stated = config.get(TOKENS) if isinstance(config, Mapping) else getattr(config, TOKENS, None)
    if stated is None:
        return None
    if not isinstance(stated, Mapping):
        raise BadInput("is no token policy", where=f"config.json, {TOKENS}", got=stated)
    return TokenPolicy.from_json(stated)


def attach_stored(model: Any) -> Engine:
    """`attach` the policy that the model's own config carries. Raises `BadInput` without one."""
    policy = stored_policy(model.config)
    if policy is None:
        raise BadInput(
            "the model's config carries no token policy",
            where=type(model).__name__,
            mend="attach(model, TokenPolicy(...))",
        )
    return attach(model, policy)


def attach_if_stored(model: Any) -> Any:
    """`attach_stored` for loaders: a model without a policy that fits stays whole; returns it.

    Why it does not fit is logged.
    """
    try:
        policy = stored_policy(model.config)
        if policy is not None:
            attach(model, policy)
    except BadInput as reason:
        _logger.warning("no tokens are pruned, against what config.json says: %s", reason)
    return model
