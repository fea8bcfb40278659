"Merge fine-tuned networks by the signal-to-noise ratio of their spectra"
import sys
from types import FunctionType, ModuleType
__version__ = "0.1.0"

def _described(f):
    "What `f?` shows in IPython: the docstring, and the comment on each argument; made when it is asked for"
    from fastcore.docments import docments
    said = [f"{'returns' if k=='return' else k}: {v}" for k,v in docments(f, args_kwargs=True).items() if v and k!='self']
    return '\n'.join([f.__doc__ or '', *(['', *said] if said else [])])

def _describe(o):
    "Give functions, and the methods of a class, the `getdoc` that IPython asks for"
    fs = [v for k,v in vars(o).items() if k[0]!='_' or k=='__init__'] if isinstance(o, type) else [o]
    for f in fs:
        if isinstance(f, FunctionType): f.getdoc = lambda f=f: _described(f)

class _Room(ModuleType):
    "A module with a function of its own name is called like it: `from spectrum_merging import scan; scan(model)`"
    def __call__(self, *args, **kwargs): return getattr(self, self.__name__.rpartition('.')[2])(*args, **kwargs)

class _Package(ModuleType):
    def __setattr__(self, name, value):
        "Where Python binds a module to its package, once it is imported"
        if isinstance(value, ModuleType):
            if callable(getattr(value, name, None)): value.__class__ = _Room
            for k in getattr(value, '__all__', ()):
                if getattr(o := getattr(value, k, None), '__module__', None)==value.__name__: _describe(o)
        super().__setattr__(name, value)

sys.modules[__name__].__class__ = _Package
