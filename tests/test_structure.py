"The house as it is meant to be: floors, sizes, and names that stay in their rooms."
import ast, json, re
from functools import cache
from pathlib import Path
import pytest
from spectrum_merging import chain, operations, spectrum, strategies # whose rules add themselves
from spectrum_merging.rules import rules

root = Path(__file__).parent.parent
lib,nbs = root/'spectrum_merging',root/'nbs'
files = {'.'.join(p.relative_to(lib).with_suffix('').parts): p for p in sorted(lib.rglob('*.py')) if p.name[0]!='_'}
core = [k for k in files if not k.startswith('lab.') and k not in ('bench','cli','command')]

# A room imports only from floors below its own.
floors = [
    ['extras','pieces'],
    ['rules','arithmetic','factors','files','patterns','parallel','clusters','matrices','batches','evaluate','plot','shown'],
    ['units','unlabelled','align','quantised','formats','stored','bounds'],
    ['spectrum','lowrank','strategies','activations','layout','pickles'],
    ['largest'],
    ['edges','adapter','decisions'],
    ['checkpoint','pictures','on_device'],
    ['names','heads','beside','drawn'],
    ['operations','scan','preflight','repair','match','blocks','live'],
    ['plan','interop','rowfit','recommend','distil'],
    ['chain','explore','stream','survey'],
    ['journal','explorer'],
    ['folder','carried'],
    ['merge','verify','hub'],
    ['blockwise'],
    ['extract','fitted','own_data','judged'],
    ['classifiers'],
    ['speakers'],
    ['candidates'],
    ['compare'],
    ['all'],
    ['lab.tasks'],
    ['lab.training','lab.packaged','lab.decoders'],
    ['lab.convolutions','lab.texts'],
    ['lab.completions'],
    ['lab.images'],
    ['lab.merges'],
    ['lab.report','lab.ahead'],
    ['lab.parts'],
    ['lab.causes','lab.inside','lab.seeds','lab.uses'],
    ['lab.paper','lab.verdicts','lab.many'],
    ['lab.findings'],
    ['lab.run'],
    ['lab.lessons'],
    ['bench','command'],
    ['cli']]
floor = {room: i for i,rooms in enumerate(floors) for room in rooms}

@cache
def tree(room): return ast.parse(files[room].read_text(encoding='utf-8'))

def resolved(room, node):
    "`from` of an import as a path from the package: '' for the package itself, None for other packages"
    if not node.level:
        top,_,rest = (node.module or '').partition('.')
        return rest if top=='spectrum_merging' else None
    above = room.split('.')[:-node.level]
    return '.'.join([*above, *([node.module] if node.module else [])])

@cache
def imports(room):
    "`(room that is imported from, name, what it is called here)`; name is None where a whole room is imported"
    found = []
    for node in ast.walk(tree(room)):
        if isinstance(node, ast.Import):
            found += [(a.name.partition('.')[2], None, a.asname) for a in node.names
                if a.name.startswith('spectrum_merging.')]
        if not isinstance(node, ast.ImportFrom) or (where := resolved(room, node)) is None: continue
        for a in node.names:
            inner = f'{where}.{a.name}'.strip('.')
            found.append((inner, None, a.asname or a.name) if inner in files else (where, a.name, a.asname or a.name))
    return found

def unsaid(node):
    "What stands in a node without being an act: docstrings, default values of arguments and classes, `__all__`, types"
    if isinstance(node, ast.Expr): return [node.value]
    if isinstance(node, ast.FunctionDef): return [*node.args.defaults, *node.args.kw_defaults]
    if isinstance(node, ast.ClassDef): return [o.value for o in node.body if isinstance(o, (ast.Assign, ast.AnnAssign))]
    if isinstance(node, ast.Assign) and getattr(node.targets[0], 'id', '')=='__all__': return [node.value]
    if isinstance(node, ast.Subscript) and getattr(node.value, 'id', '')=='Literal': return [node.slice]
    return []

def strings(room):
    "`(line, text)` of all strings that a room acts by"
    skip = {id(part) for node in ast.walk(tree(room)) for top in unsaid(node) if top is not None
        for part in [top, *getattr(top, 'elts', [])]}
    return [(o.lineno, o.value) for o in ast.walk(tree(room))
        if isinstance(o, ast.Constant) and isinstance(o.value, str) and id(o) not in skip]

def test_every_room_has_a_floor(): assert sorted(floor)==sorted(files)

@pytest.mark.parametrize('room', files)
def test_no_arrow_leads_up(room):
    "Imports within functions count, too"
    bad = [where for where,_,_ in imports(room) if where and floor[where]>=floor[room]]
    assert not bad, f'{room} imports {bad}'

def test_the_core_knows_no_lab():
    assert not [(room, where) for room in core for where,_,_ in imports(room) if where.startswith('lab')]
    assert not [(room, text) for room in core for _,text in strings(room) if 'spectrum_merging.lab' in text]

@pytest.mark.parametrize('room', files)
def test_short_rooms(room):
    n = len(files[room].read_text(encoding='utf-8').splitlines())
    assert n<=450, f'{room} has {n} lines'

def exported():
    "`(notebook, cell, number of lines)` of cells that are exported, without directives"
    for p in sorted(nbs.rglob('*.ipynb')):
        if '.ipynb_checkpoints' in p.parts: continue
        for i,c in enumerate(json.loads(p.read_text(encoding='utf-8'))['cells']):
            lines = ''.join(c['source']).splitlines()
            if c['cell_type']!='code' or not any(re.match(r'#\|\s*export', o) for o in lines): continue
            yield p.relative_to(nbs).as_posix(),i,len([o for o in lines if not o.startswith('#|')])

def test_short_cells(): assert not [o for o in exported() if o[2]>50]

@pytest.mark.parametrize('room', files)
def test_private_names_stay(room):
    "Neither `from .x import _y` nor `x._y`"
    bad = [(where, name) for where,name,_ in imports(room) if name and re.match(r'_[^_]', name)]
    modules = {here for _,name,here in imports(room) if name is None}
    bad += [(o.value.id, o.attr) for o in ast.walk(tree(room)) if isinstance(o, ast.Attribute)
        and isinstance(o.value, ast.Name) and o.value.id in modules and re.match(r'_[^_]', o.attr)]
    assert not bad, f'{room} uses {bad}'

home = {name: r.f.__module__.partition('.')[2] for name,r in rules.items() if r.f.__module__.startswith('spectrum_merging')}
# What is measured and compared is data, and data name recipes.
data = ['lab.images','lab.parts','lab.run','lab.paper','lab.findings','lab.causes','lab.inside','lab.uses','lab.lessons','lab.seeds','lab.many','bench','candidates','compare','recommend']

words = [('repair','channels'), ('lab.verdicts','ties')] # the name of a column, a verdict, too

@pytest.mark.parametrize('room', [k for k in files if k not in (*data,'all')])
def test_no_rule_is_known_by_name(room):
    "Others ask what a rule wants, never what it is called; a default value may say one"
    rest = {name for name,where in home.items() if where!=room and (room, name) not in words}
    said = [(line, text) for line,text in strings(room)
        if (m := re.fullmatch(r'(\w+)(\(.*\))?', text)) and m[1] in rest]
    called = {(home[name], rules[name].f.__name__) for name in rest}
    taken = [(where, name) for where,name,_ in imports(room) if (where, name) in called]
    modules = {here: where for where,name,here in imports(room) if name is None}
    taken += [(o.value.id, o.attr) for o in ast.walk(tree(room)) if isinstance(o, ast.Attribute)
        and isinstance(o.value, ast.Name) and (modules.get(o.value.id), o.attr) in called]
    assert not said+taken, f'{room} knows {said+taken}'

@pytest.mark.parametrize('room', [k for k in files if k not in ('units','lab.images','lab.convolutions')])
def test_heads_have_no_name_elsewhere(room):
    "`fc` is what ResNet's head is called: only `units` and the room of ResNet-18 know"
    bad = [o for o in strings(room) if re.search(r'\bfc\b', o[1])]
    bad += [(o.lineno, 'fc') for o in ast.walk(tree(room)) if isinstance(o, ast.Attribute) and o.attr=='fc']
    assert not bad, f'{room} names {bad}'
