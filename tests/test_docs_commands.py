"""Every command of the documentation is known to the tool that runs them, with a reason where it does not."""

import docs_commands
import docs_example
import pytest
from docs_commands import Command, Rule

from xlearner_d2.specs import parse_datasets, parse_sources

PAGE = """Text with `python a.py --x` and `python` alone, and ``python `b.py` ``.

    make demo    # a comment
    python c.py --long \\
        --longer 1
    step 140/600, 23%

```yaml
key: python d.py
```

```bash
#!/bin/bash
set -euo pipefail
FIRST=1 torchrun e.py   # another
```
"""


def found(text):
    return [command.text for command in docs_commands.commands_of("page.md", text)]


def test_commands_of_a_page():
    expected = ["python a.py --x", "make demo", "python c.py --long --longer 1", "FIRST=1 torchrun e.py"]
    assert found(PAGE) == expected
    lines = [command.line for command in docs_commands.commands_of("page.md", PAGE)]
    assert lines == [1, 3, 4, 15]


def test_a_program_that_is_not_known_is_not_skipped():
    with pytest.raises(ValueError, match=r"page.md:2: 'curl x' begins with no program"):
        found("```bash\ncurl x\n```\n")


def test_every_command_has_a_rule_and_every_rule_that_does_not_run_it_a_reason():
    commands = docs_commands.all_commands()
    assert len(commands) > 40
    for command in commands:
        assert docs_commands.describe(command, docs_commands.rule_for(command))
    for rule in docs_commands.RULES:
        assert rule.how in ("run", "check", "leave out")
        assert (rule.how == "run") or rule.why, rule.pattern


def test_a_command_without_a_rule():
    with pytest.raises(ValueError, match=r"x.md:3: python new.py: there is no rule"):
        docs_commands.rule_for(Command("x.md", 3, "python new.py"))


def test_options_of_all_commands_that_are_not_run():
    for command in docs_commands.all_commands():
        if docs_commands.rule_for(command).how == "check" and "benchmarks/" not in command.text:
            assert docs_commands.check_options(command.text) == [], command


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("python tools/none.py --x", "names no script of the project"),
        ("python tools/report.py", "is not accepted by its parser"),
        ("torchrun --nnodes 2 train_net.py --config-fil=x --dryrun", "is not accepted by its parser"),
        ("python train_net.py --config-file configs/none.yaml", "there is no file configs/none.yaml"),
        ("python train_net.py --config-file configs/base.yaml SOLVER.MAX_ITR 1", "There is no setting SOLVER.MAX_ITR"),
        ("python tools/bootstrap.py --wenv x", "tools/bootstrap.py has no option --wenv"),
    ],
)
def test_wrong_options(text, problem, capsys):
    (message,) = docs_commands.check_options(text)
    assert problem in message


def test_options_go_before_settings():
    command, rule = Command("x.md", 1, "python a.py --file b.py KEY 1"), Rule(pattern="", add="--dry-run")
    assert docs_commands.spelled(command, rule) == "python a.py --dry-run --file b.py KEY 1"
    assert docs_commands.spelled(command, Rule(pattern="", add="KEY 2")) == "python a.py --file b.py KEY 1 KEY 2"


def test_what_is_run(tmp_path):
    (tmp_path / "a").write_text("1")
    code = "import os; print(open('b').read()); assert os.environ['DETECTRON2_DATASETS'].endswith('data'); exit(NUMBER)"
    command, rule = Command("x.md", 1, f'python -c "{code}"'), Rule(pattern="", copy=("a", "b"))
    swap = {number: Rule(pattern="", copy=rule.copy, swap=("NUMBER", number)) for number in ("0", "3")}
    assert docs_commands.perform(command, swap["0"], tmp_path, limit=60) == []
    (problem,) = docs_commands.perform(command, swap["3"], tmp_path, limit=60)
    assert problem.startswith("it ended with 3:\n1")
    (problem,) = docs_commands.perform(Command("x.md", 1, "sleep 9"), Rule(pattern=""), tmp_path, limit=0.1)
    assert problem == "it took more than 0.1 s"


def test_the_example_leaves_what_somebody_else_wrote(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tmp_path.chmod(0o755)
    docs_example.main()
    docs_example.main()  # its own files may be there
    assert tmp_path.stat().st_mode & 0o777 == 0o755
    own = tmp_path / "data/coco/annotations/instances_train2017.json"
    own.write_text("mine")
    with pytest.raises(SystemExit, match=r"instances_train2017\.json is there already, and is not from this example"):
        docs_example.main()
    assert own.read_text() == "mine"


def test_the_example_is_the_config_of_the_readme():
    config = docs_example.shorten(docs_example.read_config())
    problems: list[str] = []
    assert [spec.name for spec in parse_sources(config["XLEARNER"]["SOURCES"], problems)] == ["birds", "cells", "coco"]
    assert len(parse_datasets(config["XLEARNER"]["DATASETS"], problems)) == 4
    assert problems == []
