"""Words of the model card that depend on the configuration alone."""

import yaml

from yxanul_nemo.config.load import compose, parse
from yxanul_nemo.export.formats import model_card


def test_the_card_names_the_data_sets_and_their_licences() -> None:
    config = parse(compose(["recipe=yxanul_197m_h100", "data.sources.math.path=/my/own", "export.license=cc-by-4.0"]))
    card = model_card(
        config.model,
        vocab_size=700,
        eos_token="</s>",
        tokens=1,
        recipe="r",
        checkpoint="c",
        dtype="float32",
        factorized=False,
        license_name=config.export.license,
        datasets=config.data.fetched_licenses,
        parity={"max_logit_difference": 0.0, "rounding_logit_difference": 0.0},
        validation=None,
    )
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["license"] == "cc-by-4.0"
    # Mathematics is one's own here, of which nothing is known.
    assert front["datasets"] == ["HuggingFaceFW/fineweb-edu", "codeparrot/codeparrot-clean"]
    assert "| licence of the text from HuggingFaceFW/fineweb-edu | ODC-By 1.0" in card
