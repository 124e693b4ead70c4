"""What all commands have in common: how they read their options and what they say of a wrong one."""

import pytest
import transformers

from peft_pst.cli import COMMANDS, main
from peft_pst.cli.console import quiet_transformers

REQUIRED = {
    "train": ["--model_name_or_path", "m", "--output_dir", "o"],
    "merge": ["adapter", "output"],
    "shrink": ["checkpoint", "output"],
    "report": ["adapter"],
    "bench": ["adapter"],
    "demo": [],
    "compact": ["pruned", "small"],
    "expand": ["small", "dense"],
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("argument", "hint"), [("--zzz", "see peft-pst {command} --help."), ("--hel", "did you mean --help?")]
)
def test_an_option_is_never_guessed(command: str, argument: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, *REQUIRED[command], argument]) == 2
    says = f"{argument} is not an option; {hint.format(command=command)}"
    assert capsys.readouterr().err == f"peft-pst {command}: error: {says}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_begins_as_a_sentence(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    usage, description = capsys.readouterr().out.split("\n\n")[:2]
    assert usage.startswith(f"usage: peft-pst {command} ")
    assert description[0].isupper()
    assert description.rstrip().endswith(".")
    if command == "report":
        assert " PATH" in usage


@pytest.mark.parametrize("bars", [True, False])
@pytest.mark.parametrize("were_shown", [True, False])
def test_transformers_is_quiet_for_a_while(bars: bool, were_shown: bool) -> None:
    logging = transformers.logging
    verbosity, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    try:
        (logging.enable_progress_bar if were_shown else logging.disable_progress_bar)()
        with quiet_transformers(bars=bars):
            assert logging.get_verbosity() == logging.ERROR
            assert logging.is_progress_bar_enabled() == (bars and were_shown)
        assert logging.is_progress_bar_enabled() == were_shown
        assert logging.get_verbosity() == verbosity
    finally:
        (logging.enable_progress_bar if shown else logging.disable_progress_bar)()
