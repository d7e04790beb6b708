"""Everything that is not the model itself."""

from tinygpt.device import check_cache, export_compiler

export_compiler()
check_cache()
