"""Makes `import demo` find examples/demo, with no other script of examples/ on the path."""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path


DEMO = Path(__file__).parents[2] / "examples" / "demo"

spec = spec_from_file_location("demo", DEMO / "__init__.py", submodule_search_locations=[str(DEMO)])
assert spec is not None and spec.loader is not None
sys.modules["demo"] = module_from_spec(spec)
spec.loader.exec_module(sys.modules["demo"])
