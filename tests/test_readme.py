"""The README's Python examples run as they stand, one after another."""

import pathlib
import re

README = pathlib.Path(__file__).parents[1] / "README.md"


def test_the_examples_run():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) >= 3
    scope: dict = {}
    exec("\n".join(blocks), scope)
    assert scope["o"].shape == (2, 1000, 4, 128)
    assert scope["tokens"].shape == (1, 8)
