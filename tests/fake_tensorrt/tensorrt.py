"""A test double: see double.py. It builds nothing, measures nothing and is never shipped."""

import double as _double

globals().update(_double.module())
