"""What the commands do, from checked arguments to a JSON-ready result; their options are in `command_line`."""

from transformers.utils import logging as transformers_logging

transformers_logging.disable_progress_bar()
transformers_logging.set_verbosity_error()
