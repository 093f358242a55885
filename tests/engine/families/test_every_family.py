"""What every family promises; a new one is covered without an edit here."""

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm", reason="needs vLLM")

from tokenprune.engine.families import families, family_of, known_architectures

EVERY = [pytest.param(family, id=family.name) for family in families()]


def config_of(decoder, **options):
    multimodal = SimpleNamespace(is_multimodal_pruning_enabled=lambda: False)
    return SimpleNamespace(
        model_config=SimpleNamespace(
            hf_text_config=SimpleNamespace(model_type=decoder), multimodal_config=multimodal
        )
    )


def test_an_architecture_belongs_to_one_family():
    names = known_architectures()
    assert len(set(names)) == len(names)
    assert all(name in family_of(name).architectures for name in names)
    assert family_of("NoSuchModel") is None


@pytest.mark.parametrize("family", EVERY)
def test_its_architectures_are_models_of_vllms_that_take_images(family):
    from vllm.model_executor.models.registry import ModelRegistry

    for name in family.architectures:
        assert name in ModelRegistry.get_supported_archs()


@pytest.mark.parametrize("family", EVERY)
def test_it_takes_its_own_decoders_and_names_them_to_others(family):
    for decoder in family.decoders:
        assert family.visual_unsupported(config_of(decoder)) is None
    refused = family.visual_unsupported(config_of("mamba"))
    assert refused == f"decoder type 'mamba' is not among {', '.join(family.decoders)}"


@pytest.mark.parametrize("family", EVERY)
def test_it_has_a_tower_or_says_that_there_is_none_to_score(family):
    if type(family).tower is type(family).__mro__[1].tower:
        assert "cannot be scored" in family.importance_unsupported(config_of("x"))
