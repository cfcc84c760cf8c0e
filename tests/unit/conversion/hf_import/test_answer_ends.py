"""Every token that ends the original's answers ends ours and the export's."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from megatron_dattn.conversion.hf_export.run import export_checkpoint
from megatron_dattn.conversion.hf_import.run import import_checkpoint, import_whole_model
from megatron_dattn.errors import UserError
from megatron_dattn.inference import Prompt, generate_tokens, load_model
from megatron_dattn.inference.load import RunAssets, find_run, load_assets
from megatron_dattn.runtime.distributed import destroy_distributed
from tests.support.run_folders import make_run_folder
from tests.unit.conversion.hf_models import SPECIAL_TOKENS, save_language, save_vision

ENDS = [SPECIAL_TOKENS.index("</s>"), SPECIAL_TOKENS.index("[/INST]")]
LETTER = len(SPECIAL_TOKENS)


@pytest.fixture
def base(tmp_path):
    save_vision(tmp_path / "vision")
    save_language(tmp_path / "language")
    set_ends(tmp_path / "language", ENDS)
    return tmp_path


def set_ends(folder: Path, ends: object) -> None:
    content = {"bos_token_id": 1, "eos_token_id": ends, "temperature": 0.6, "do_sample": True}
    (folder / "generation_config.json").write_text(json.dumps(content))


def exported_ends(folder: Path) -> list[int]:
    content = json.loads((folder / "generation_config.json").read_text())
    assert "temperature" not in content, "answers are greedy"
    return content["eos_token_id"]


def assets(run: Path) -> RunAssets:
    return load_assets(run, find_run(run)[1])


def test_both_ends_of_a_chat_model_reach_the_export_and_come_back(base):
    make_run_folder(base, base / "run", "dattn")
    assert assets(base / "run").stop_ids == set(ENDS)
    export_checkpoint(base / "run", base / "hf")
    assert exported_ends(base / "hf") == ENDS
    import_whole_model(base / "hf", base / "again", dtype="fp32")
    assert assets(base / "again").stop_ids == set(ENDS)


def test_the_generator_stops_at_the_second_one(base):
    make_run_folder(base, base / "run", "dattn")
    loaded = load_model(base / "run")
    try:
        prompt = Prompt.from_question(loaded, "why?", [])
        (free,) = generate_tokens(loaded, [prompt], max_new_tokens=8)
        assert len(free) == 8, "nothing ends it"
        stopping = replace(loaded, origin_ends=frozenset({free[2]}))
        (answer,) = generate_tokens(stopping, [prompt], max_new_tokens=8)
        assert answer == free[: free.index(free[2]) + 1]
    finally:
        destroy_distributed()


def test_line_breaks_that_end_an_export_s_captions_end_no_answers_after_it(base):
    make_run_folder(base, base / "run", "dattn")
    settings = yaml.safe_load((base / "run" / "config.yaml").read_text())
    settings["data"]["template"] = "plain"
    (base / "run" / "config.yaml").write_text(yaml.safe_dump(settings))
    export_checkpoint(base / "run", base / "hf")
    line_breaks = set(exported_ends(base / "hf")) - set(ENDS)
    assert line_breaks
    import_whole_model(base / "hf", base / "again")
    _, config = find_run(base / "again")
    assert load_assets(base / "again", config).stop_ids == {*ENDS, *line_breaks}
    assert load_assets(base / "again", config, template="mistral_v3").stop_ids == set(ENDS)


@pytest.mark.parametrize(
    ("ends", "expected"),
    [(2, {2}), (None, {2}), ([], {2}), ([2, LETTER, 10**6], {2}), ([4], {2, 4})],
)
def test_other_forms(base, ends, expected):
    set_ends(base / "language", ends)
    make_run_folder(base, base / "run", "dattn")
    assert assets(base / "run").stop_ids == expected


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"eos_token_id": "</s>"}', '{"eos_token_id": [true]}']
)
def test_a_damaged_file_is_one_error(base, content):
    (base / "language" / "generation_config.json").write_text(content)
    with pytest.raises(
        UserError, match=r"language/generation_config\.json (is not|must|has eos_token_id)"
    ):
        import_checkpoint(base / "vision", base / "language", base / "out")
    assert not (base / "out").exists()
