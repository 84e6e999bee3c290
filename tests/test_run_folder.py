"""One layout of a run's folder: nothing is in it twice, and validations inside phases are listed in order."""

from pathlib import Path

from yxanul_nemo.run_folder import RunFolder


def test_each_file_has_a_place_of_its_own(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    names = [name for name, value in vars(RunFolder).items() if isinstance(value, property)]
    paths = [getattr(folder, name) for name in names]
    paths += [folder.log("launcher"), folder.log("export"), folder.slurm_note("data"), folder.slurm_script("data")]
    paths += [folder.slurm_log("data", 1), folder.phase_result(1), folder.in_phase_result(1, 10)]
    paths.append(folder.checkpoint_result("tokens_000000000000010"))
    assert len(set(paths)) == len(paths)
    assert all(path.is_relative_to(tmp_path) for path in paths)


def test_validations_inside_phases_are_found_in_the_order_of_tokens(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.in_phase_results() == []
    folder.validation.mkdir()
    wanted = [
        (tokens, folder.in_phase_result(number, tokens)) for number, tokens in ((1, 900), (2, 1000), (10, 20_000))
    ]
    others = [
        folder.phase_result(2),
        folder.checkpoint_result("tokens_000000000000900"),
        folder.validation / "phase-x.json",
    ]
    for path in [path for _, path in reversed(wanted)] + others:
        path.write_text("{}", encoding="utf-8")
    assert folder.in_phase_results() == wanted
