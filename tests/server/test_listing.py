"""`GET /v1/pruning/policies` tells all a client needs."""

import json

from tokenprune.policies import methods
from tokenprune.request import OFF, PRESETS, parse_pruning
from tokenprune.server.listing import policies_listing
from tokenprune.shape import EngineShape

ENGINE = EngineShape(num_layers=8, boundaries=(0, 2, 3), max_num_batched_tokens=512)


def test_every_policy_is_listed_with_its_schema_and_defaults() -> None:
    listing = policies_listing(ENGINE, OFF)
    assert set(listing["policies"]) == {"visual", "kv", "channels"}
    visual = listing["policies"]["visual"]
    assert set(visual) == set(methods("visual"))
    assert visual["transprune"]["needs_whole_prompt"] is True
    assert visual["uniform"]["needs_whole_prompt"] is False
    assert visual["transprune"]["defaults"]["alpha"] == 0.5
    assert visual["transprune"]["schema"]["properties"]["keep_ratio"]["maximum"] == 1


def test_presets_default_and_boundaries_are_listed() -> None:
    listing = policies_listing(ENGINE, parse_pruning("balanced"))
    assert listing["presets"] == PRESETS
    assert listing["default"] == PRESETS["balanced"]
    assert listing["engine"]["prune_layers"] == [2, 3]
    assert listing["engine"]["visual_unsupported"] is None
    assert listing["engine"]["allow_channel_pruning"] is False
    assert policies_listing(ENGINE, OFF)["default"] == {}


def test_the_listing_is_json() -> None:
    json.dumps(policies_listing(ENGINE, OFF), allow_nan=False)
