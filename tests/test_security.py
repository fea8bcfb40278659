"SECURITY.md is what holds: each command opens, writes and connects to what stands there, and to nothing else."
import configparser, json, os, re, subprocess, sys
from pathlib import Path
import numpy as np, pytest, sysconfig
from safetensors.numpy import save_file

root = Path(__file__).parent.parent
told = (root/'SECURITY.md').read_text(encoding='utf-8')

# Every call that opens, changes or reaches for something, as Python tells it, in this process and in forks of it.
_watched = '''
import os, sys
_log = os.open(os.environ['WATCHED'], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
_said = False
def _tell(event, args):
    global _said
    if _said: return
    _said = True
    try:
        if event=='open' and isinstance(args[0], (str, bytes)):
            writes = bool((args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))
            line = 'write' if writes else 'read',os.path.abspath(os.fsdecode(args[0]))
        elif event in ('os.rename', 'os.link', 'os.symlink'): line = 'write',os.path.abspath(os.fsdecode(args[1]))
        elif event in ('os.remove', 'os.rmdir', 'os.mkdir', 'os.truncate', 'os.chmod', 'os.utime') and isinstance(args[0], (str, bytes)):
            line = 'write',os.path.abspath(os.fsdecode(args[0]))
        elif event in ('socket.connect', 'socket.bind', 'socket.getaddrinfo'): line = 'connect',repr(args[-1] if event!='socket.getaddrinfo' else args[0])
        elif event in ('subprocess.Popen', 'os.system', 'os.exec', 'os.posix_spawn'): line = 'start',repr(args[0])
        else: return
        os.write(_log, ('\\t'.join(line).replace('\\n', ' ')+'\\n').encode(errors='backslashreplace'))
    finally: _said = False
sys.addaudithook(_tell)
'''

def run(name, *args, at):
    "What a command did: `{kind: paths}`"
    f,log = at/'bin'/f'spectrum-{name}.py',at/'bin'/f'{name}.log'
    f.parent.mkdir(exist_ok=True)
    log.unlink(missing_ok=True)
    f.write_text(f'{_watched}\nsys.path.insert(0, {str(root)!r})\nfrom spectrum_merging.cli import {name}_cli\nsys.exit({name}_cli())\n')
    (at/'here').mkdir(exist_ok=True)
    p = subprocess.run([sys.executable, f, *map(str, args)], capture_output=True, text=True, cwd=at/'here', timeout=300, env=os.environ
        | dict(WATCHED=str(log), SPECTRUM_CACHE=str(at/'cache'), TMPDIR=str(at/'tmp'), PYTHONDONTWRITEBYTECODE='1', OMP_NUM_THREADS='1'))
    assert not p.returncode, p.stdout+p.stderr
    res = {}
    for line in log.read_text(errors='replace').splitlines():
        kind,_,what = line.partition('\t')
        res.setdefault(kind, set()).add(what)
    return res

_system = [*{str(Path(o).resolve()) for o in (sys.prefix, sys.base_prefix, *sysconfig.get_paths().values())}, sys.prefix, sys.base_prefix,
    '/usr', '/lib', '/etc', '/proc', '/sys', '/dev', str(Path.home()/'.config/matplotlib'), str(Path.home()/'.cache/matplotlib')]

def odd(paths, *allowed):
    "Paths in none of these folders; what begins like a path that ends in a dot is in it"
    return sorted(o for o in paths if not any(o==str(a) or o.startswith(f'{a}' if str(a).endswith('.') else f'{a}/') for a in allowed))

@pytest.fixture
def d(tmp_path):
    rng = np.random.default_rng(0)
    W = rng.standard_normal((48, 64)).astype('f4')
    for m,c in dict(base=0, a=.1, b=.2).items():
        (tmp_path/m).mkdir()
        D = np.outer(rng.standard_normal(48), rng.standard_normal(64))+.1*rng.standard_normal((48, 64))
        save_file({'x.weight': (W+c*D).astype('f4'), 'x.bias': np.ones(48, 'f4')}, tmp_path/m/'model.safetensors')
        (tmp_path/m/'vocab.txt').write_text('a\n')
    (tmp_path/'tmp').mkdir()
    (tmp_path/'secret').write_text('s')
    return tmp_path

jobs = dict(scan=('a', '--base', 'base'), merge=('a', 'b', '--base', 'base', '--strategy', 'tsv_m', '--out', 'out'),
    extract=('a', '--base', 'base', '--out', 'out'))

@pytest.mark.parametrize('name', jobs)
def test_opens_what_it_says(name, d):
    "Reads the models and its own code; writes the result, its partial folder beside it, the cache, temporary files; connects to nothing"
    places = [d/o if not str(o).startswith('-') and (d/o).is_dir() or o=='out' else o for o in jobs[name]]
    did = run(name, *places, at=d)
    own = [d/'tmp', d/'cache', d/'out', f'{d}/.out.', '/dev/null']
    # The parent is made where it is not there; a name alone is one in a folder that is open.
    assert not odd(did.get('write', set())-{str(d)}-{str(d/'here'/o) for o in ('journal',)}, *own), did['write']
    assert not odd(did['read']-{str(d)}, *_system, root, *own, d/'a', d/'b', d/'base', d/'bin', d/'here')
    assert str(d/'secret') not in did['read'] and not did.get('connect') and not did.get('start')
    if name=='merge':
        did = run('verify', d/'out', at=d)
        assert not odd(did.get('write', ()), d/'cache', d/'tmp', '/dev/null'), did['write']
        assert not did.get('connect') and not did.get('start') and str(d/'secret') not in did['read']

def test_repairs_open_what_they_say(tmp_path):
    "Unlabelled inputs and tokenizers are read, the rest is as without a repair; no link leads out of a folder of images"
    import torch, transformers as T
    from tokenizers import Tokenizer, models, pre_tokenizers
    tok = Tokenizer(models.WordLevel({'[PAD]': 0, 'good': 1, 'bad': 2}, 'bad'))
    tok.pre_tokenizer = pre_tokenizers.Whitespace()
    for i,m in enumerate('ab'):
        torch.manual_seed(i)
        T.BertForSequenceClassification(T.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=3,
            max_position_embeddings=9)).save_pretrained(tmp_path/m)
        T.PreTrainedTokenizerFast(tokenizer_object=tok, pad_token='[PAD]').save_pretrained(tmp_path/m)
        (tmp_path/f'{m}.csv').write_text('text\n'+'good bad\nbad\n'*20)
    for o in ('tmp', 'pictures'): (tmp_path/o).mkdir()
    (tmp_path/'secret').write_text('s')
    did = run('merge', f'a={tmp_path/"a"}', f'b={tmp_path/"b"}', '--out', tmp_path/'out', '--repair', 'match', 'heads', '--inputs',
        f'a={tmp_path/"a.csv"}', f'b={tmp_path/"b.csv"}', at=tmp_path)
    own = [tmp_path/'tmp', tmp_path/'cache', tmp_path/'out', f'{tmp_path}/.out.', '/dev/null']
    own += [o for o in did['write'] if Path(o).name.startswith('torchinductor_')] # torch makes an empty folder when its compiler is imported
    assert not odd(did.get('write', set())-{str(tmp_path), str(tmp_path/'here/journal')}, *own), did['write']
    assert not odd(did['read']-{str(tmp_path)}, *_system, root, *own, *(tmp_path/o for o in ('a', 'b', 'bin', 'here')), f'{tmp_path}/a.', f'{tmp_path}/b.')
    assert not did.get('connect') and str(tmp_path/'secret') not in did['read']
    (tmp_path/'pictures/a.png').symlink_to(tmp_path/'secret')
    from spectrum_merging.unlabelled import read_inputs
    with pytest.raises(ValueError, match='holds no images'): read_inputs(tmp_path/'pictures', 'a')
    os.mkfifo(tmp_path/'pipe.csv')
    with pytest.raises(ValueError, match='is a pipe'): read_inputs(tmp_path/'pipe.csv', 'a')

def test_every_command_is_told():
    settings = configparser.ConfigParser(delimiters='=')
    settings.read(root/'settings.ini')
    names = re.findall(r'spectrum-\w+', settings['DEFAULT']['console_scripts'])
    assert names and all(f'`{o}`' in told for o in names)
