"""Shell completion, in the shells themselves where they are installed."""

import shutil
import subprocess

import pytest

from hf_coar import cli, demo
from hf_coar.cli import completion

pytest.importorskip("shtab")

# What bash does at a press of the tab key: call the function that `complete` has registered.
BASH = """
source {script}
name=$(complete -p hf-coar | sed 's/.*-F \\([^ ]*\\) .*/\\1/')
COMP_WORDS=(hf-coar {words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
$name hf-coar "${{COMP_WORDS[-1]}}" "${{COMP_WORDS[-2]}}"
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


_VERBS = {"run", "components", "attribute", "evaluate", "show", "edit", "explore", "push", "demo", "completion"}


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("completion")
    for shell in completion.SHELLS:
        (folder / f"hf-coar.{shell}").write_text(completion.script(cli.parser(), shell), encoding="utf-8")
    return folder


def pressed(scripts, words):
    script = BASH.format(script=scripts / "hf-coar.bash", words=words)
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("a", {"attribute"}),
        ("''", _VERBS),
        ("attribute --rou", {"--rounds"}),
        ("attribute --granularity ''", {"unit", "input", "head", "expert", "module"}),
        ("attribute x y --method weight", {"weight_norm"}),
        ("edit runs --rule wel", {"welch"}),
        ("completion z", {"zsh"}),
    ],
)
def test_bash(scripts, words, expected):
    assert set(pressed(scripts, words)) >= expected
    assert len(pressed(scripts, words)) <= len(expected)


def test_bash_completes_paths(scripts):
    assert str(demo.MODEL) in pressed(scripts, f"components {demo.FOLDER}/mo")


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed")
def test_fish(scripts):
    command = f"source {scripts}/hf-coar.fish; complete -C 'hf-coar attribute --granularity '"
    done = subprocess.run(["fish", "-c", command], capture_output=True, text=True, check=True)
    assert {line.split("\t")[0] for line in done.stdout.splitlines()} >= {"unit", "head"}


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
def test_zsh_knows_the_function(scripts):
    command = f'autoload -Uz compinit; compinit -D -u; eval "$(<{scripts}/hf-coar.zsh)"; whence -w ${{_comps[hf-coar]}}'
    done = subprocess.run(["zsh", "-f", "-c", command], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip().endswith(": function"), done.stdout + done.stderr


def test_the_verb_prints_it(capsys):
    assert cli.main(["completion", "bash"]) == 0
    assert capsys.readouterr().out.rstrip().endswith("_shtab_hf_coar hf-coar")


def test_without_shtab_the_error_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "shtab", None)
    assert cli.main(["completion", "bash"]) == 2
    assert "hf_coar[completion]" in capsys.readouterr().err
