"""What the command line shows, as lines; nothing here prints."""

from cswap_deploy.console.answers import (
    check_lines,
    finding_lines,
    group_lines,
    layer_lines,
    measured_lines,
    prepared_lines,
    verified_lines,
)
from cswap_deploy.console.comparison import bundle_lines, file_lines, left_lines, next_commands
from cswap_deploy.console.live import Console
from cswap_deploy.console.text import WIDTH
from cswap_deploy.console.unit import unit_lines

__all__ = [
    "WIDTH",
    "Console",
    "bundle_lines",
    "check_lines",
    "file_lines",
    "finding_lines",
    "group_lines",
    "layer_lines",
    "left_lines",
    "measured_lines",
    "next_commands",
    "prepared_lines",
    "unit_lines",
    "verified_lines",
]
