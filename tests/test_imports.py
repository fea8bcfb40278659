"The core imports nothing heavy, and works where nothing heavy is installed."
import json, os, re, subprocess, sys
from configparser import ConfigParser
from pathlib import Path
import numpy as np, pytest
from safetensors.numpy import save_file
from spectrum_merging.extras import extras

root = Path(__file__).parent.parent
core = ('extras','pieces','clusters','arithmetic','files','patterns','formats','stored','pickles','quantised','names','parallel','rules','spectrum','lowrank','adapter','checkpoint','units','scan','strategies',
    'decisions','operations','preflight','plan','interop','layout','stream','journal','folder','merge','verify','extract','hub')
heavy = 'torch','transformers','datasets','torchvision','matplotlib','sklearn','IPython' # torch alone: 2 s and 500 MB
slow = (*heavy,'pandas','scipy','pyarrow') # 0.7 s together, which only tables and SNRs are worth

def python(code, *args, cwd=root):
    return subprocess.run([sys.executable, '-c', code, *map(str, args)], capture_output=True, text=True, cwd=cwd, env=os.environ|dict(PYTHONPATH=str(root)))

def test_core_is_light():
    res = python(f'''import sys, spectrum_merging
for name in {core}:
    __import__(f'spectrum_merging.{{name}}')
    found = [o for o in {heavy} if o in sys.modules]
    if found: sys.exit(f'spectrum_merging.{{name}} imports {{found}}')''')
    assert res.returncode==0, res.stderr

@pytest.fixture(scope='module')
def files(tmp_path_factory):
    "A base and two experts, as files that NumPy wrote"
    d,rng = tmp_path_factory.mktemp('light'),np.random.default_rng(0)
    base = {f'l{i}.weight': rng.normal(size=(24, 32)).astype('f4') for i in range(3)} | {'l0.bias': np.zeros(24, 'f4')}
    save_file(base, d/'base.safetensors')
    for name,i in dict(a=0, b=1).items():
        new = {k: v+.01*rng.normal(size=v.shape).astype('f4') for k,v in base.items()}
        new[f'l{i}.weight'] += np.outer(*(rng.normal(size=n) for n in (24, 32))).astype('f4')*.05
        save_file(new, d/f'{name}.safetensors')
    return d

# Ends with the modules that a command has imported
told = '''import atexit, json, sys
sys.argv = ['spectrum-merge', *sys.argv[1:]]
atexit.register(lambda: print('\\n' + json.dumps([*sys.modules])))
from spectrum_merging.cli import merge_cli
merge_cli()'''

def imported(res):
    assert res.returncode==0, res.stderr
    return {o.partition('.')[0] for o in json.loads(res.stdout.splitlines()[-1])} & {*slow}

def test_start(files, tmp_path):
    "Neither help nor a merge without SNRs waits for pandas, SciPy or PyTorch; the control looks at SNRs"
    merge = files/'a.safetensors',files/'b.safetensors','--base',files/'base.safetensors','--out'
    assert imported(python(told, '--help', cwd=tmp_path))==set()
    assert imported(python(told, *merge, 'plain', cwd=tmp_path))==set()
    assert imported(python(told, *merge, 'sum', '--strategy', 'task_arithmetic', cwd=tmp_path))==set()
    assert imported(python(told, 'plain/model.safetensors', 'sum/model.safetensors', '--plan', 'plain/plan.csv', '--out', 'again', cwd=tmp_path))==set()
    assert 'pandas' in imported(python(told, *merge, 'snr', '--strategy', 'snr_winner', cwd=tmp_path))

# Python without what only extras bring; then commands, one after the other, each with its exit status
bare = '''import shlex, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in ABSENT: raise ModuleNotFoundError(f'No module named {name!r}', name=name)
sys.meta_path.insert(0, Absent())
from spectrum_merging import cli
for line in sys.argv[1:]:
    name,*sys.argv[1:] = shlex.split(line)
    try: getattr(cli, f'{name}_cli')()
    except SystemExit as e: print(f'{name} ends with {e}')'''.replace('ABSENT', repr({o for names in extras.values() for o in names}))

def test_without_extras(files, tmp_path):
    "What README promises of the core, where torch and all other extras are absent"
    with_base = f'{files}/a.safetensors {files}/b.safetensors --base {files}/base.safetensors'
    res = python(bare, f'scan {files}/a.safetensors --base {files}/base.safetensors', f'merge {with_base} --strategy snr_winner --save-plan plan.csv --out one',
        f'merge {with_base} --plan plan.csv --out two', f'merge {with_base} --strategy tsv_m --out three', 'verify one --all', 'verify three --all',
        f'extract three --base {files}/base.safetensors --out adapter', f'merge {with_base} --dry-run', cwd=tmp_path)
    assert res.returncode==0 and 'ends with' not in res.stdout, res.stdout+res.stderr
    same = [(tmp_path/o/'model.safetensors').read_bytes() for o in ('one', 'two')]
    assert same[0]==same[1] and (tmp_path/'adapter/adapter_model.safetensors').is_file()

@pytest.mark.parametrize('line,extra', [('merge A B --base BASE --repair match --inputs x.csv --out o', 'torch'), ('compare m=A n=B --base BASE --data m=x.csv n=x.csv --out o', 'torch'),
    ('explore A B', 'browser'), ('run vision --quick --out o', 'lab'), ('scan old.pt', 'torch')])
def test_missing_extra_is_named(files, tmp_path, line, extra):
    "In one line, with its remedy, and never as if the file were damaged"
    (tmp_path/'x.csv').write_text('text\nfine\n')
    (tmp_path/'old.pt').write_bytes(b'PK\x03\x04'+bytes(200))
    for k in ('BASE','A','B'): line = re.sub(rf'\b{k}\b', f'{files}/{k.lower()}.safetensors', line)
    res = python(bare, line, cwd=tmp_path)
    assert f"pip install 'spectrum-merging[{extra}]'" in res.stdout and 'Traceback' not in res.stdout+res.stderr, res.stdout+res.stderr

def test_extras_are_the_settings():
    "The table that names remedies, and what is installed"
    ini = ConfigParser(delimiters=['='])
    ini.read(root/'settings.ini', encoding='utf-8')
    def packages(key): return {re.match(r'[\w-]+', o)[0] for o in ini['DEFAULT'][key].split('\n') if o.strip()}
    called = dict(sklearn='scikit-learn', IPython='ipywidgets', traitlets='ipywidgets') # brought by what
    names = {k: {called.get(o, o) for o in v} for k,v in extras.items()}
    for k,v in names.items(): assert v <= packages(f'{k}_requirements')
    assert not packages('requirements') & set().union(*names.values())
    assert 'spectrum-merging[lab,browser]' in ini['DEFAULT']['dev_requirements'] and 'spectrum-merging[torch]' in ini['DEFAULT']['lab_requirements']
