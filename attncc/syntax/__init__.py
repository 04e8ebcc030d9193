"""From text to syntax tree and back."""

from attncc.syntax.parser import parse as parse
from attncc.syntax.parser import use_cache_folder as use_cache_folder
