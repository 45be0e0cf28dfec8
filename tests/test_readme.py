"""The README's Python examples run as they stand, one after another; its commands and options exist."""

import dataclasses
import importlib.util
import pathlib
import re
import shlex

import pytest

from train.config import TrainConfig, parse

README = (pathlib.Path(__file__).parents[1] / "README.md").read_text()
SHELL = "\n".join(re.findall(r"```sh\n(.*?)```", README, re.DOTALL)).replace("\\\n", " ").splitlines()
TEXT = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
INLINE = [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", TEXT)]
TRAIN = re.compile(r".*python -m train (.*)")
PLACEHOLDERS = {"N": "1", "I": "0", "STEP": "5"}


def train_options() -> list[str]:
    """What `python -m train` is given in shell blocks and in text, and options that the text names alone."""
    commands = [found[1] for code in SHELL + INLINE if (found := TRAIN.match(code))]
    training = TEXT.split("\n## Training\n")[1].split("\n## ")[0]
    alone = [c for c in INLINE if re.match(r"--\w+[.]", c) or (c.startswith("--") and f"`{c}`" in training)]
    return list(dict.fromkeys(code for code in commands + alone if "--help" not in code))


def known_options() -> set[str]:
    found = {"--" + f.name.replace("_", "-") for f in dataclasses.fields(TrainConfig)}
    for group in dataclasses.fields(TrainConfig):
        if dataclasses.is_dataclass(group.type):
            for f in dataclasses.fields(group.type):
                prefixes = ("", "no-") if f.type is bool else ("",)
                found |= {f"--{group.name}.{prefix}{f.name.replace('_', '-')}" for prefix in prefixes}
    return found


def test_the_examples_run():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 3
    scope: dict = {}
    exec("\n".join(blocks), scope)
    assert scope["o"].shape == (2, 1000, 4, 128)
    assert scope["tokens"].shape == (1, 8)


def test_the_trainer_takes_the_options():
    assert len(train_options()) > 20
    for options in train_options():
        words = [PLACEHOLDERS.get(word, word) for word in shlex.split(options, comments=True)]
        names = {word for word in words if word.startswith("--")}
        assert names <= known_options(), options
        if names == set(words):  # no values
            continue
        last = words.index("|") - 1 if "|" in words else len(words) - 1  # the last value has alternatives
        for value in words[last::2]:
            try:
                parse([*words[:last], value])
            except SystemExit:
                pytest.fail(f"python -m train does not take {options}")


def test_the_modules_of_all_commands_exist():
    modules = set(re.findall(r"python -m ([\w.]+)", README))
    assert len(modules) > 20
    for name in modules:
        spec = importlib.util.find_spec(name)
        assert spec, name
        if spec.submodule_search_locations is not None:  # a package
            assert importlib.util.find_spec(f"{name}.__main__"), name
