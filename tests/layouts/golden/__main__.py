"""``python -m tests.layouts.golden [--update]``: show which golden layouts differ, or write them anew."""

from __future__ import annotations

import argparse
import sys

from tests.layouts import golden

parser = argparse.ArgumentParser(prog="python -m tests.layouts.golden", description=__doc__)
parser.add_argument("--update", action="store_true", help="write the golden files anew")
if parser.parse_args().update:
    print("\n".join(golden.update()) or "nothing has changed")
else:
    differ = [n for n in golden.VARIANTS if not golden.path(n).exists() or golden.path(n).read_text() != golden.text(n)]
    print("\n".join(differ) or "nothing has changed")
    sys.exit(bool(differ))
