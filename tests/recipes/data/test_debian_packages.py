"""Records in the form of `apt-cache show`: one package per source, continued lines joined."""

from __future__ import annotations

from recipes.data.debian_packages import read_packages

LONG = "A shell that is usable as an interactive login shell and as a command processor for scripts of every kind."
SHOWN = f"""Package: zsh
Source: zsh (5.9-4)
Version: 5.9
Description-en: shell with lots of features
 {LONG[:52]}
 {LONG[53:]}
 .
 More.
Description-md5: a1

Package: zsh-doc
Source: zsh
Description-en: zsh documentation
 {LONG} Its manual, which is another text.
Description-md5: b2

Package: tiny
Description-en: too short
 Nothing.
"""


def test_one_title_and_description_per_source():
    assert read_packages(SHOWN) == [("shell with lots of features", (LONG + " More.")[:160])]
