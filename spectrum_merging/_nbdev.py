"What `nbdev-export` adds to a module's docstring (`export_procs` in pyproject.toml); the package itself never imports it"
import re
from pathlib import Path
from nbdev.config import get_config

class NotebookName:
    "Name the notebook of a module below its summary, as nbdev names a page where there is a host"
    def __init__(self, nb): self.nb = nb

    def __call__(self, cell):
        if cell.cell_type!='markdown' or not cell.source.startswith('# '): return
        path = Path(self.nb.path_).resolve().relative_to(get_config().config_path)
        # nbdev takes the lines that start with '> ' as the docstring's summary
        cell.source = re.sub(r'^> .*(\n> .*)*', rf'\g<0>\n> \n> Docs: {path.as_posix()}', cell.source, count=1, flags=re.M)
