"""From text to syntax tree and back."""

from attncc.syntax.format import format_source as format_source
from attncc.syntax.parser import parse as parse
from attncc.syntax.parser import use_cache_folder as use_cache_folder
from attncc.syntax.printer import print_file as print_file
