"What nbdev takes from here (`export_procs` and `renderer` in pyproject.toml); the package itself never imports it"
import inspect, re
from pathlib import Path
from nbdev.config import get_config
from nbdev.showdoc import BasicMarkdownRenderer

class NotebookName:
    "Name the notebook of a module below its summary, as nbdev names a page where there is a host"
    def __init__(self, nb): self.nb = nb

    def __call__(self, cell):
        if cell.cell_type!='markdown' or not cell.source.startswith('# '): return
        path = Path(self.nb.path_).resolve().relative_to(get_config().config_path)
        # nbdev takes the lines that start with '> ' as the docstring's summary
        cell.source = re.sub(r'^> .*(\n> .*)*', rf'\g<0>\n> \n> Docs: {path.as_posix()}', cell.source, count=1, flags=re.M)

class Signature(BasicMarkdownRenderer):
    "What `show_doc` shows: a class is a `class`, and what the page itself defines is of no other module"
    def __init__(self, sym, *args, **kwargs):
        super().__init__(sym, *args, **kwargs)
        self.dm = str(self.dm).replace('__main__.', '').replace(':NoneType=None', '=None')
        if inspect.isclass(sym): self.dm = re.sub(r'\A(async )?def ', 'class ', self.dm).replace(')->None:', '):')
