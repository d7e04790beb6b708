"""Everything that is not the model itself."""

from tinygpt.device import export_compiler

export_compiler()
