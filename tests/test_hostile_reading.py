"What others wrote is read with suspicion: names are names, only regular files are read, and a refusal is one line that names the file."
import json, os, random, re, resource, shutil, signal, struct, subprocess, sys, time
from pathlib import Path
import numpy as np, pandas as pd, pytest
from spectrum_merging.arithmetic import is_finite, number_types, storage
from spectrum_merging.checkpoint import Checkpoint
from spectrum_merging.files import DEEPEST, InputFile, inside, lies_inside, open_regular, parse_json, read_text
from spectrum_merging.formats import read_config, weight_folders
from spectrum_merging.interop import read_snr_results, read_unfrozen
from spectrum_merging.layout import read_scans
from spectrum_merging.patterns import pattern
from spectrum_merging.plan import Plan
from spectrum_merging.preflight import beside_notes, check_model_name, name_models
from spectrum_merging.stored import file_metadata, open_safetensors

root = Path(__file__).parent.parent
rng = np.random.default_rng(0)
codes = {'float32': 'F32', 'int64': 'I64', 'uint8': 'U8'}

def blob(tensors, meta=None, head=None):
    "A safetensors file, with another header where one is given"
    h,b = {} if meta is None else {'__metadata__': meta},b''
    for k,v in tensors.items():
        h[k] = dict(dtype=codes[str(v.dtype)], shape=list(v.shape), data_offsets=[len(b), len(b)+v.nbytes])
        b += v.tobytes()
    text = (json.dumps(h) if head is None else head).encode()
    return struct.pack('<Q', len(text))+text+b

def good(): return {'l.weight': rng.standard_normal((8, 16)).astype('f4'), 'l.bias': np.zeros(8, 'f4')}

@pytest.fixture
def d(tmp_path):
    for m in 'ab': (tmp_path/f'{m}.safetensors').write_bytes(blob(good()))
    (tmp_path/'m').mkdir()
    (tmp_path/'m/model.safetensors').write_bytes(blob(good()))
    return tmp_path

def command(name, *args, cwd=None, before=None, timeout=60, wrap=''):
    "Exit status and output of a command in a process of its own"
    code = f'{wrap}\nimport sys\nfrom spectrum_merging.cli import {name}_cli\nsys.argv[0] = "spectrum-{name}"\nsys.exit({name}_cli())'
    f = Path(cwd or args[-1]).parent/f'run_{name}.py' if not isinstance(cwd, Path) else cwd/f'run_{name}.py'
    f.write_text(code)
    p = subprocess.run([sys.executable, f, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors='replace',
        timeout=timeout, preexec_fn=before, cwd=f.parent, env=os.environ | dict(PYTHONPATH=str(root), HF_HUB_OFFLINE='1', OMP_NUM_THREADS='1'))
    assert 'Traceback' not in p.stdout, p.stdout
    return p.returncode,p.stdout

# --- names in files are names ---

@pytest.mark.parametrize('name', ['../a.safetensors', '/etc/passwd', 'x/../../a.safetensors', '.', '..', '', './..', 'a//..//../b', 'C:\\a', 'c:a', '..\\a',
    'a\0b', 'a\nb', 'a/', '/proc/self/environ', '\ud800', 'x'*5000+'/../../../..'])
def test_names_that_lead_out(name, d):
    with pytest.raises((ValueError, OSError), match='no file of its folder|outside|too long'): inside(name, d/'m', 'index.json')

@pytest.mark.parametrize('name', ['a.safetensors', 'sub/a.safetensors', 'a b.safetensors', '..a', 'a..', 'ä.safetensors', 'sub/../a.safetensors'])
def test_names_that_stay(name, d): assert inside(name, d/'m', 'index.json').resolve().is_relative_to((d/'m').resolve())

@pytest.mark.parametrize('name', ['../a.safetensors', '/etc/passwd', 'link.safetensors', 'sub/a.safetensors'])
def test_shards_elsewhere(name, d):
    (d/'m/model.safetensors').unlink()
    (d/'m/link.safetensors').symlink_to(d/'a.safetensors')
    (d/'m/sub').symlink_to(d)
    (d/'m/model.safetensors.index.json').write_text(json.dumps(dict(weight_map={'l.weight': name})))
    with pytest.raises(ValueError, match='no file of its folder|outside of the model'): Checkpoint(d/'m')

@pytest.mark.parametrize('name', ['model.safetensors', 'model.safetensors.index.json', 'x.safetensors', 'pytorch_model.bin', 'x.pt'])
def test_links_out_of_a_folder(name, d):
    (d/'n').mkdir()
    (d/'n'/name).symlink_to(d/'a.safetensors')
    with pytest.raises((ValueError, FileNotFoundError), match='outside of the model|holds no model'): Checkpoint(d/'n')

def test_links_that_stay(d):
    "Within the folder, in the hub's cache, and whatever a user names"
    hub = d/'models--o--n'
    (hub/'blobs').mkdir(parents=True); (hub/'snapshots/rev').mkdir(parents=True)
    shutil.copy(d/'a.safetensors', hub/'blobs'/('0'*64))
    (hub/'snapshots/rev/model.safetensors').symlink_to(f'../../blobs/{"0"*64}')
    (d/'user').symlink_to(hub/'snapshots/rev')
    (d/'u.safetensors').symlink_to(d/'a.safetensors')
    (d/'n').mkdir(); shutil.copy(d/'a.safetensors', d/'n/real.safetensors'); (d/'n/model.safetensors').symlink_to('real.safetensors')
    for o in (hub/'snapshots/rev', d/'user', d/'u.safetensors', d/'n'): assert len(Checkpoint(o))==2
    (hub/'blobs').rename(d/'blobs'); (hub/'blobs').symlink_to('/') # blobs themselves lead elsewhere
    (hub/'snapshots/rev/model.safetensors').unlink(); (hub/'snapshots/rev/model.safetensors').symlink_to(d/'a.safetensors')
    with pytest.raises(ValueError, match='outside of the model'): Checkpoint(hub/'snapshots/rev')

def test_a_head_names_its_body(d):
    (d/'out/heads/cat').mkdir(parents=True)
    shutil.copy(d/'a.safetensors', d/'out/model.safetensors')
    index = d/'out/heads/cat/model.safetensors.index.json'
    index.write_text(json.dumps(dict(weight_map={k: '../../model.safetensors' for k in good()})))
    with pytest.raises(ValueError, match='no file of its folder'): Checkpoint(index.parent)
    (d/'out/merge.json').write_text('{}')
    assert len(Checkpoint(index.parent))==2
    index.write_text(json.dumps(dict(weight_map={k: '../../../a.safetensors' for k in good()})))
    with pytest.raises(ValueError, match='no file of its folder'): Checkpoint(index.parent)

@pytest.mark.parametrize('path', ['..', '../m', '/etc', 'link', '.', 5])
def test_modules_elsewhere(path, d):
    (d/'m/link').symlink_to(d)
    (d/'m/modules.json').write_text(json.dumps([dict(path=path)]))
    with pytest.raises(ValueError, match='modules.json|outside of the model'): weight_folders(d/'m')

def test_scans_elsewhere(d):
    (d/'r/scans').mkdir(parents=True)
    (d/'secret.csv').write_text('name,unit,role,shape,snr\na,a,matrix,"(2, 2)",1\n')
    (d/'r/scans/link.csv').symlink_to(d/'secret.csv')
    for name in ('../../secret.csv', '/etc/passwd', 'link.csv', '..', 5, None, ['a']):
        (d/'r/scans/index.json').write_text(json.dumps(dict(weights={'cats': name})))
        with pytest.raises((ValueError, FileNotFoundError), match='index.json|outside|missing'): read_scans(d/'r')

@pytest.mark.parametrize('name', ['..', '.', '.a', 'a/b', 'a\\b', 'a@b', 'a:b', 'a\nb', 'a\x1b[2J', '\ud800', 'x'*300, '', ' ', 'base', 'snr_a', 5, None])
def test_names_of_models(name):
    with pytest.raises(ValueError, match='model name'): check_model_name(name)

def test_a_tensor_is_no_head(d):
    "An @ stands between a tensor and its task"
    for m in 'ab': (d/f'{m}.safetensors').write_bytes(blob(good() | {'l.weight@../../a': np.ones((2, 2), 'f4')}))
    with pytest.raises(ValueError, match='@'): name_models([d/'a.safetensors', d/'b.safetensors'])

# --- only regular files, of a size that makes sense ---

@pytest.mark.parametrize('name', ['model.safetensors', 'model.safetensors.index.json', 'x.safetensors.index.json', 'pytorch_model.bin', 'x.bin', 'config.json',
    'modules.json', 'tokenizer.json', 'adapter_config.json', 'vocab.txt', 'x.pt'])
@pytest.mark.parametrize('kind', ['pipe', 'device', 'folder'])
def test_what_is_no_file(name, kind, d):
    (d/'n').mkdir()
    if name not in ('model.safetensors', 'pytorch_model.bin', 'x.bin', 'x.pt') and 'index' not in name: shutil.copy(d/'a.safetensors', d/'n/model.safetensors')
    if kind=='pipe': os.mkfifo(d/'n'/name)
    elif kind=='device': (d/'n'/name).symlink_to('/dev/zero')
    else: (d/'n'/name).mkdir()
    signal.alarm(20) # ends the test, and all others, where one waits
    try: beside_notes(*name_models([d/'n', d/'b.safetensors']))
    except (ValueError, FileNotFoundError) as e: assert str(d/'n') in str(e)
    finally: signal.alarm(0)

def test_a_pipe_ends_a_command(d):
    (d/'n').mkdir()
    os.mkfifo(d/'n/x.safetensors.index.json')
    rc,text = command('merge', d/'n', d/'b.safetensors', '--out', d/'out', cwd=d, timeout=40)
    assert rc==1 and 'a pipe' in text and not (d/'out').exists()

@pytest.mark.parametrize('path', ['/dev/zero', '/dev/stdin', '/dev/tty', '/proc/self/mem', '/proc/kmsg', '/etc', 'pipe'])
def test_paths_of_users(path, d):
    "As model, plan, table and results: refused at once"
    os.mkfifo(d/'pipe')
    p = d/path if path=='pipe' else Path(path)
    for f in (Checkpoint, Plan.load, read_snr_results, lambda o: read_unfrozen(o, ['a']), read_text, open_safetensors, file_metadata):
        with pytest.raises((ValueError, OSError)): f(p)

def test_too_long(d):
    with (d/'p.csv').open('wb') as f: f.truncate(1<<40)
    for f in (Plan.load, read_snr_results, lambda o: read_unfrozen(o, ['a'])):
        with pytest.raises(ValueError, match='more than'): f(d/'p.csv')

def test_few_open_files(d):
    (d/'s').mkdir()
    sd = {f'l{i}.weight': rng.standard_normal((4, 8)).astype('f4') for i in range(60)}
    for i,(k,v) in enumerate(sd.items()): (d/f's/s{i}.safetensors').write_bytes(blob({k: v}))
    (d/'s/model.safetensors.index.json').write_text(json.dumps(dict(weight_map={k: f's{i}.safetensors' for i,k in enumerate(sd)})))
    rc,text = command('merge', d/'s', d/'s', '--out', d/'out', cwd=d, before=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40)))
    assert rc==0 or 'ulimit' in text and not (d/'out').exists()

# --- JSON and CSV ---

deep = ['['*10**6, '{"a":'*10**5+'1'+'}'*10**5, '['*(DEEPEST+5)+']'*(DEEPEST+5)]

@pytest.mark.parametrize('text', [*deep, '"\\ud800"', '{"a": "\\uDFff"}', '9'*5000, '', 'nul', '{"a"', '\x00', '{"a": 1}{'])
def test_bad_json(text):
    with pytest.raises(ValueError, match='note.json'): parse_json(text, 'note.json')

@pytest.mark.parametrize('text', [*deep, '5', '[]', '"x"', '{}', 'null', '{"weight_map": 5}', '{"weight_map": {"a": 5}}', '{"weight_map": {}}', '{"weight_map": [["a", "b"]]}',
    '{"weight_map": {"a": null}}', '\ufeff', '\x80'])
def test_bad_index(text, d):
    (d/'m/model.safetensors').unlink()
    (d/'m/model.safetensors.index.json').write_bytes(text.encode('latin-1', 'replace'))
    with pytest.raises((ValueError, FileNotFoundError), match='/m'): Checkpoint(d/'m')

entry = dict(dtype='F32', shape=[1], data_offsets=[0, 4])
heads = [dict(w=entry | o) for o in (dict(shape=None), dict(shape='ab'), dict(shape={'a': 1}), dict(shape=[1.]), dict(shape=[True]), dict(shape=[-1]), dict(shape=[2**70, 0]),
    dict(shape=[1]*65), dict(shape=[10**300, 10**300]), dict(dtype=None), dict(dtype=['F32']), dict(dtype={}), dict(dtype=5), dict(dtype='F4'), dict(data_offsets=None), dict(data_offsets=[0]),
    dict(data_offsets=[0, 4, 8]), dict(data_offsets='ab'), dict(data_offsets=[4, 0]), dict(data_offsets=[0., 4.]), dict(data_offsets=[0, 10**400]))]
heads += [5, [], 'x', None, dict(w=5), dict(w=[]), dict(w=None), {'__metadata__': 5}, {'__metadata__': [1]}, {'__metadata__': {'a': 5}}, {'__metadata__': {'a': None}},
    {'x\rb': entry}, {'x\x1b[31m': entry}, {'\u202egnp': entry}, {'x'*2000: entry}]

@pytest.mark.parametrize('head', [*map(json.dumps, heads), *deep, '{"\\ud800": 1}', '{"w": 1, "w": 2}', '{"w": NaN}', '\x00'], ids=range(len(heads)+7))
def test_bad_headers(head, d):
    f = d/'bad.safetensors'
    f.write_bytes(blob({}, head=head)+bytes(4))
    for open_it in (Checkpoint, file_metadata):
        with pytest.raises(ValueError, match='bad.safetensors'): open_it(f)

@pytest.mark.parametrize('config', ['{"architectures": 5}', '{"architectures": {"a": 1}}', '{"architectures": [5]}', '{"model_type": []}', '{"quantization_config": []}',
    '{"num_hidden_layers": 1000000000}', '{"n_layer": 1e300}', '{"depths": [2, 100000]}', '{"vision_config": {"num_layers": NaN}}', '{"num_labels": 1e9}', '{"id2label": []}', '{"%s": 1}' % ('a.'*500)])
def test_bad_config(config, d):
    (d/'m/config.json').write_text(config)
    for f in (read_config, Checkpoint):
        with pytest.raises(ValueError, match='config.json'): f(d/'m')

@pytest.mark.parametrize('line', ['', '#', '# 5', '# []', '# {}', '# {"models": 5}', '# {"models": [5]}', '# {"models": ["a", "a"]}', '# {"models": ["a"], "notes": 5}',
    '# {"models": ["a"], "notes": [5]}', '# {"models": ["a"], "strategy": ["x"]}', *('# '+o for o in deep)])
def test_bad_plan_line(line, d):
    (d/'p.csv').write_text(line+'\nname,unit,role,op,base,a,reason\nw,u,matrix,linear,0,1,r\n')
    with pytest.raises(ValueError, match='p.csv is no plan'): Plan.load(d/'p.csv')

@pytest.mark.parametrize('rows', ['', 'name\nw', 'name,unit,role,op,base,a\nw,u,m,linear,0,1e999', 'name,unit,role,op,base,a\nw,u,m,linear,0,x', 'name,unit,role,op,base,a,a\nw,u,m,linear,0,1,1',
    'name,unit,role,op,base,a\nw,u,m,linear,0,1,2,3', 'name,unit,role,op,base,a\nw,u,m,linear', 'name,unit,role,op,base,a\n"w,u,m,linear,0,1', 'name,unit,role,op,base,a\nw,u,m,"tsv_m(share=9)",1,1',
    'name,unit,role,op,base,a\nw,u,m,__import__,1,1', f'name,unit,role,op,base,a\n{"w"*200000},u,m,linear,0,nan'])
def test_bad_plan_rows(rows, d):
    (d/'p.csv').write_text('# {"models": ["a"]}\n'+rows)
    with pytest.raises(ValueError, match='p.csv is no plan'): Plan.load(d/'p.csv')

@pytest.mark.parametrize('name', ['x\rb', 'x\nb', 'x\r\nb', '"', '""x', "'", ',', '#', '\0', ' x ', '\t', '=1+1', 'NaN', '\x1b', '\u2028', '😀', '\ufeffx'])
def test_plans_read_what_they_wrote(name, tmp_path):
    t = pd.DataFrame(dict(name=[name, 'z'], unit=name, role='matrix', op='linear', base=0., a=[.1, 1/3], reason=name))
    plan = Plan(t, dict(models=['a'], strategy='x'))
    again = Plan.load(plan.save(tmp_path/'p.csv'))
    pd.testing.assert_frame_equal(again.table, plan.table, check_dtype=False)
    assert again.digest==plan.digest

def test_a_plan_is_text_in_a_notebook(): assert '<img' not in Plan(pd.DataFrame(dict(name=['w'], unit='u', role='m', op='linear', base=0., a=1.)),
    dict(models=['a'], strategy='<img src=x onerror=alert(1)>'))._repr_html_()

# --- Spectrum's files ---

@pytest.mark.parametrize('text', [*deep, '5', '[]', '{}', 'null', '{"l": {"snr": 1%s, "type": "x"}}' % ('0'*400), '{"l": {"snr": "x", "type": 1}}', '{"l": {"snr": null, "type": "x"}}',
    '{"l": {"snr": [1], "type": "x"}}', '{"l": 5}', '{"l": {"type": "x"}}'])
def test_bad_snr_results(text, d):
    (d/'s.json').write_text(text)
    with pytest.raises(ValueError, match='s.json'): read_snr_results(d/'s.json')

laughs = 'a: &a [x,x,x,x,x,x,x,x,x]\n'+''.join(f'{c}: &{c} [{",".join(["*"+p]*9)}]\n' for p,c in zip('abcdefghi', 'bcdefghij'))+'unfrozen_parameters: *j\n'
@pytest.mark.parametrize('text', ['', '5', '[]', 'x: 1', 'unfrozen_parameters: 5', 'unfrozen_parameters: {a: 1}', 'unfrozen_parameters: [5]', 'unfrozen_parameters: [[a]]', '['*5000, 'a: '*3000,
    laughs, 'unfrozen_parameters: !!python/object/apply:os.system [id]', 'unfrozen_parameters: [2026-99-99]', '? [a]\n: b', 'unfrozen_parameters:\n- (', 'unfrozen_parameters:\n- (a', '\x00',
    'unfrozen_parameters: ['+'9'*5000+']', 'unfrozen_parameters: [(?=a)b]', 'unfrozen_parameters: ["'+'('*400+')'*400+'"]', 'unfrozen_parameters: [nothing.like.it]'])
def test_bad_unfrozen(text, d):
    (d/'u.yaml').write_text(text)
    t = time.time()
    with pytest.raises(ValueError, match='u.yaml'): read_unfrozen(d/'u.yaml', ['model.layers.0.weight'])
    assert time.time()-t<10

slow = [r'(\w+\.?)+!', '(a+)+$!', '(a|a)*b', '(a|aa)+$b', '.*.*.*.*.*.*.*.*.*.*.*.*x', '((a*)*)*b', '(x+x+)+y', r'(?:\w*\.?)*!', 'a{0,1000}a{0,1000}b', '(.*a){12}b']
@pytest.mark.parametrize('p', slow)
def test_patterns_end(p, d):
    t = time.time()
    assert not pattern(p)('a'*300)
    assert time.time()-t<10

def some_pattern(r, depth=0):
    o = r.random()
    if depth>3 or o<.45: return r.choice(['a','b','.',r'\w','[ab]','[^a]',r'\.','^','$',r'\b','c'])
    if o<.6: return some_pattern(r, depth+1)+r.choice(['*','+','?','{1,2}','{2}','*?','+?','{,2}','{1,}'])
    if o<.75: return f'({some_pattern(r, depth+1)})'
    return f'({some_pattern(r, depth+1)}|{some_pattern(r, depth+1)})' if o<.85 else some_pattern(r, depth+1)+some_pattern(r, depth+1)

def test_patterns_mean_what_re_means():
    "All ends that a match may have, by asking `re` for each"
    r,n = random.Random(1),0
    for _ in range(3000):
        p,s = some_pattern(r),''.join(r.choice('ab.c') for _ in range(r.randint(0, 6)))
        try:
            re.compile(p)
            found = pattern(p)(s)
        except (ValueError, re.error): continue
        assert found=={e for e in range(len(s)+1) if re.compile(rf'(?:{p})(?=[\s\S]{{{len(s)-e}}}\Z)').match(s)}, (p, s)
        n += 1
    assert n>2500

# --- numbers ---

@pytest.mark.parametrize('dtype', [k for k,o in number_types.items() if o.is_float or o.is_complex])
def test_finite(dtype):
    "As torch sees every code, or many"
    import torch
    kind = np.dtype(storage[dtype])
    raw = np.arange(1<<8*kind.itemsize, dtype='u4').astype(kind) if kind.itemsize<3 else np.concatenate([rng.integers(0, 2**64, 4000, 'u8').view(kind),
        np.frombuffer(struct.pack('<4d', np.inf, -np.inf, np.nan, 1), kind), np.frombuffer(struct.pack('<4f', np.inf, -np.inf, np.nan, 1), kind)])
    t = torch.frombuffer(bytearray(raw.tobytes()), dtype=getattr(torch, dtype))
    want = torch.isfinite(t.to(torch.complex128 if t.is_complex() else torch.float64)).tolist()
    assert [is_finite(raw[i:i+1], dtype) for i in range(len(raw))]==want

# --- pickles ---

def test_a_pickle_that_shrinks(d):
    import torch
    sd = dict(w=torch.randn(300, 400), t=torch.randn(30, 40).T, s=torch.randn(50)[::2], h=torch.randn(9).bfloat16(), n=torch.tensor(3))
    for i,new in enumerate((True, False)):
        torch.save(sd, d/f'{i}.pt', _use_new_zipfile_serialization=new)
        ck = Checkpoint(d/f'{i}.pt')
        for k,v in sd.items(): assert ck.read(k).equal(v)
        os.truncate(d/f'{i}.pt', 500)
        for k,v in sd.items():
            if not new: assert ck.read(k).equal(v) # what was before PyTorch 1.6 lies in memory
            else:
                with pytest.raises(ValueError, match=f'{i}.pt'): ck.read(k)

def test_a_pickle_that_runs_code(d):
    import pickle
    class Evil:
        def __reduce__(self): return os.system,(f'touch {d}/PWNED',)
    for name in ('x.pt','x.bin','pytorch_model.bin'):
        (d/name).write_bytes(pickle.dumps(dict(w=Evil())))
        with pytest.raises(ValueError, match=name): Checkpoint(d/name)
    assert not (d/'PWNED').exists()

def test_a_compressed_pickle(d):
    "PyTorch would map its bytes as they lie there, which are not the numbers"
    import torch, zipfile
    torch.save(dict(w=torch.zeros(100, 100)), d/'a.pt')
    with zipfile.ZipFile(d/'a.pt') as z, zipfile.ZipFile(d/'b.pt', 'w', zipfile.ZIP_DEFLATED) as out:
        for o in z.namelist(): out.writestr(o, z.read(o))
    try: assert Checkpoint(d/'b.pt').read('w').equal(torch.zeros(100, 100))
    except ValueError as e: assert 'b.pt' in str(e)

# --- commands ---

def test_ctrl_c(d):
    for m in 'ab': (d/f'{m}.safetensors').write_bytes(blob({f'l{i}.weight': rng.standard_normal((400, 500)).astype('f4') for i in range(60)}))
    stop = 'import os, signal, threading, time\ndef f():\n    time.sleep(2.5)\n    os.kill(os.getpid(), signal.SIGINT)\nthreading.Thread(target=f, daemon=True).start()'
    rc,text = command('merge', d/'a.safetensors', d/'b.safetensors', '--strategy', 'snr_winner', '--out', d/'out', cwd=d, wrap=stop, timeout=120)
    assert rc==130 and 'interrupted' in text and not (d/'out').exists() or rc==0

def test_little_memory(d):
    sd = lambda: {'l.weight': rng.standard_normal((1500, 3000)).astype('f4')}
    for m in 'abc': (d/f'{m}.safetensors').write_bytes(blob(sd()))
    rc,text = command('merge', d/'a.safetensors', d/'b.safetensors', '--base', d/'c.safetensors', '--strategy', 'tsv_m', '--out', d/'out', cwd=d, timeout=120,
        before=lambda: resource.setrlimit(resource.RLIMIT_AS, (700<<20, 700<<20)))
    assert (rc==0)==(d/'out').exists() and (rc==0 or 'memory' in text.lower())

@pytest.mark.parametrize('args', [('~nosuchuser/x', 'B', '--out', 'o'), ('A', 'B', '--out', '~nosuchuser/x'), ('A', 'B', '--plan', '~nosuchuser/p.csv', '--out', 'o'), ('A', 'B', '--base', '~nosuchuser', '--out', 'o'),
    ('x'*5000, 'B', '--out', 'o'), ('A', 'B', '--out', 'x'*5000), ('A', 'B', '--out', 'o', '--workers', '-5'), ('..=A', 'B', '--out', 'o'), ('..=A', 'b=B', '--out', 'o'), ('A', 'B', '--plan', '/dev/zero', '--out', 'o')])
def test_arguments(args, d):
    files = dict(A=d/'a.safetensors', B=d/'b.safetensors', o=d/'o')
    rc,text = command('merge', *(str(files.get(o, o)).replace('=A', f'={d}/a.safetensors').replace('=B', f'={d}/b.safetensors') for o in args), cwd=d)
    assert rc!=0 and text.strip() and not (d/'o').exists() or rc==0 and '--workers' in args

def test_output_that_nobody_reads(d):
    rc,text = command('scan', d/'a.safetensors', cwd=d, wrap='import os, sys\nr,w = os.pipe()\nos.close(r)\nos.dup2(w, 1)')
    assert rc==1

def test_names_do_not_move_a_cursor(d):
    (d/'p.csv').write_text('# {"models": ["a", "b"], "notes": ["\\u001b[2Jgone"]}\nname,unit,role,op,base,a,b,reason\nl.weight,u,matrix,linear,0,.5,.5,r\nl.bias,u,matrix,linear,0,.5,.5,r\n')
    rc,text = command('merge', d/'a.safetensors', d/'b.safetensors', '--plan', d/'p.csv', '--out', d/'out', cwd=d)
    assert '\x1b' not in text and rc==0
