"""Files changed at random: each is read right, or refused with a message that names it; nothing hangs, grows or crashes.

`pytest tests/test_fuzz.py` takes some hundred changes of each kind of file, `--long` 10,000. A target alone, from a change on:
`python tests/test_fuzz.py plan 10000 0`. A fault prints the number of its change; what it was made of lies in the folder named."""
import csv, hashlib, io, json, math, os, random, re, resource, shutil, signal, struct, subprocess, sys, tempfile, time, warnings
from pathlib import Path
import numpy as np

root = Path(__file__).parent.parent
SECONDS,MEMORY = 20,1<<30 # Time that one input may take, memory beyond what the process had before
documented = ValueError,FileNotFoundError,FileExistsError
odd = [None, True, -1, 0, 1, 2**31, 2**63, 10**400, 1e308, -0.0, .5, float('nan'), float('inf'), '', '../x', '../../etc/passwd', '/etc/passwd', '/dev/zero', 'a\0b', '\ud800',
    'x\r\ny', '$\\frac{', '<img src=x>', '*', '(a+)+$', 'x'*3000, [], {}, [[]], [1]*70, {'a': {'b': [1]}}, 'F32', 'linear', 'a', 'b', 'l.weight', 'model.safetensors']

def deep(r):
    o = r.choice(odd)
    for _ in range(r.choice([1, 3, 90, 200])): o = [o] if r.random()<.5 else {'a': o}
    return o

def places(o, at=()):
    "Paths to all parts of a JSON value"
    yield at
    for k,v in o.items() if isinstance(o, dict) else enumerate(o) if isinstance(o, list) else (): yield from places(v, (*at, k))

def changed(o, r):
    "A JSON value with one part replaced, removed, renamed, doubled or put elsewhere"
    o = json.loads(json.dumps(o))
    at = r.choice(list(places(o)))
    value = deep(r) if r.random()<.1 else r.choice(odd)
    if not at: return value if r.random()<.3 else o
    parent = o
    for k in at[:-1]: parent = parent[k]
    how,k = r.random(),at[-1]
    if how<.5: parent[k] = value
    elif how<.65: del parent[k]
    elif isinstance(parent, dict): parent[str(r.choice([v for v in odd if isinstance(v, str)]))] = parent.pop(k) if how<.85 else parent[k]
    else: parent.insert(r.randrange(len(parent)+1), value)
    return o

def broken(raw, r):
    "Bytes with a few of them changed, left out, doubled, or cut off"
    raw = bytearray(raw)
    for _ in range(r.choice([1, 1, 1, 3, 10])):
        if not raw: break
        i = r.randrange(len(raw)) if r.random()<.5 else min(len(raw)-1, int(r.expovariate(1/40)))
        how = r.random()
        if how<.45: raw[i] ^= 1<<r.randrange(8)
        elif how<.6: raw[i:i+r.choice([1, 4, 30])] = b''
        elif how<.75: raw[i:i] = r.choice([b'\0', b'\xff', b'"', b'\n', b'\r', b',', b'[', b'{', b'9'*r.choice([1, 400]), b'\xf0\x9f', b'../', bytes(r.randrange(256) for _ in range(8))])
        elif how<.85: raw[i:i] = raw[i:i+r.choice([4, 60])]
        elif how<.95: del raw[i:]
        else: raw[i:i+8] = struct.pack('<Q', r.choice([0, 1, 2**31, 2**63, 2**64-1, len(raw)]))
    return bytes(raw)

def text_of(o, r):
    "JSON, now and then with its bytes changed too"
    raw = json.dumps(o).encode()
    return broken(raw, r) if r.random()<.2 else raw

# --- independent readers ---

codes = {'F32': 'f4', 'F64': 'f8', 'I64': 'i8', 'F16': 'f2', 'BF16': 'u2', 'U8': 'u1', 'F8_E4M3': 'u1'}
def blob(tensors, meta=None):
    h,b = {} if meta is None else {'__metadata__': meta},b''
    for k,(code,shape,raw) in tensors.items():
        h[k] = dict(dtype=code, shape=shape, data_offsets=[len(b), len(b)+len(raw)])
        b += raw
    return h,b
def joined(h, b):
    t = h if isinstance(h, bytes) else json.dumps(h).encode()
    return struct.pack('<Q', len(t))+t+b
def plain(raw):
    "`{name: bytes}` of a safetensors file, read in five lines"
    n = int.from_bytes(raw[:8], 'little')
    h = json.loads(raw[8:8+n])
    return {k: raw[8+n:][slice(*v['data_offsets'])] for k,v in h.items() if k!='__metadata__'}
def read(ck):
    from spectrum_merging.checkpoint import Checkpoint
    res = {}
    for k,o in ck.infos.items():
        buf = bytearray(o.nbytes)
        if buf: ck.read_into(k, memoryview(buf))
        res[k] = bytes(buf)
    return res
rng = np.random.default_rng(0)
def floats(*shape): return rng.standard_normal(shape).astype('f4')
def model(i=0): return {'l.weight': ('F32', [8, 16], floats(8, 16).tobytes()), 'l.bias': ('F32', [8], floats(8).tobytes()), 'm.weight': ('F32', [4, 8], floats(4, 8).tobytes())}
def save(path, tensors, **kw):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(joined(*blob(tensors, **kw)))
    return path

# --- targets: `make(folder)` once, `one(folder, state, r)` for each change: raises a documented error, or is right ---

class Safetensors:
    def make(self, d): return blob(model() | {'i': ('I64', [3], bytes(24)), 'e': ('F32', [0, 4], b''), 'h': ('BF16', [2], bytes(4)), 'q': ('F8_E4M3', [4], bytes(4))}, meta={'format': 'pt'})
    def one(self, d, state, r):
        from spectrum_merging.checkpoint import Checkpoint
        h,b = state
        raw = broken(joined(h, b), r) if r.random()<.5 else joined(text_of(changed(h, r), r), b)
        (d/'x.safetensors').write_bytes(raw)
        ck = Checkpoint(d/'x.safetensors')
        found,want = read(ck),plain(raw)
        assert found==want, 'other bytes than an independent reader finds'
        from safetensors import safe_open
        with safe_open(d/'x.safetensors', 'np') as f: assert set(f.keys())==set(found), 'other names than safetensors finds'

class Index:
    def make(self, d):
        m = model()
        for i,(k,v) in enumerate(m.items()): save(d/f'm/s{i}.safetensors', {k: v})
        save(d/'secret.safetensors', m)
        return m,dict(metadata=dict(total_size=1), weight_map={k: f's{i}.safetensors' for i,k in enumerate(m)})
    def one(self, d, state, r):
        from spectrum_merging.checkpoint import Checkpoint
        m,index = state
        o = changed(index, r)
        if r.random()<.2 and isinstance(o, dict) and isinstance(o.get('weight_map'), dict): o['weight_map'][r.choice(list(m))] = r.choice(['../secret.safetensors', str(d/'secret.safetensors'), './s0.safetensors', 's1.safetensors'])
        (d/'m/model.safetensors.index.json').write_bytes(text_of(o, r))
        ck = Checkpoint(d/'m')
        assert all(p.resolve().parent==(d/'m').resolve() for p in ck.files), 'a file of elsewhere was opened'
        assert all(m[k][2]==v for k,v in read(ck).items())

class PlanFile:
    def make(self, d):
        from spectrum_merging.plan import make_plan
        import torch # not while it runs: a limit on memory is set then
        ms = {m: save(d/f'{m}.safetensors', model()) for m in 'ab'}
        plan = make_plan('standard', ms, heads=['m'])
        plan.save(d/'p.csv')
        return ms,(d/'p.csv').read_bytes(),{m: {k: np.frombuffer(v, 'f4') for k,v in plain(p.read_bytes()).items()} for m,p in ms.items()}
    def one(self, d, state, r):
        from spectrum_merging.plan import Plan
        from spectrum_merging.merge import merge
        ms,raw,w = state
        if r.random()<.6: new = broken(raw, r)
        else:
            head,_,rest = raw.decode().partition('\n')
            rows = list(csv.reader(io.StringIO(rest)))
            if r.random()<.3: head = '# '+json.dumps(changed(json.loads(head[1:]), r))
            else:
                i = r.randrange(len(rows))
                rows[i][r.randrange(len(rows[i]))] = str(r.choice(['nan', '1e999', '-0', '1e-320', '9'*400, '', 'tsv_m', 'ties(density=0.5)', 'x@a', 'x@../../a', '@', 'l.weight@b', *[o for o in odd if isinstance(o, str)]]))
            buf = io.StringIO()
            csv.writer(buf, lineterminator='\n').writerows(rows)
            new = (head+'\n'+buf.getvalue()).encode('utf-8', 'surrogatepass')
        (d/'x.csv').write_bytes(new)
        plan = Plan.load(d/'x.csv')
        table = [o for o in csv.reader(io.StringIO(new.decode('utf-8-sig').partition('\n')[2], newline='')) if o]
        want = {o[table[0].index('name')]: [float(o[table[0].index(k)]) for k in ['base', *plan.models]] for o in table[1:]}
        assert {q['name']: list(plan.coefs(q).values()) for q in plan.table.to_dict('records')}==want, 'other coefficients than csv finds'
        assert Plan.load(plan.save(d/'again.csv', overwrite=True)).digest==plan.digest, 'it is not read back as it was written'
        try: res = merge(plan, ms)
        except documented as e: raise Refused(e) from e
        for q in plan.table.to_dict('records'):
            if q['op']!='linear': continue
            k = q['name'].partition('@')[0]
            x = sum(np.float64(q[m])*w[m][k] for m in 'ab')
            got = res[q['name']].numpy().reshape(-1)
            assert np.allclose(got, x, rtol=1e-5, atol=1e-5*max(1, abs(q['a']), abs(q['b']))), f"wrong numbers in {k}"

class Refused(ValueError):
    "An error of the second step, whose message need not name the file that was changed"

class Manifest:
    def make(self, d):
        from spectrum_merging.merge import merge
        from spectrum_merging.plan import make_plan
        ms = {m: save(d/f'{m}.safetensors', model()) for m in 'ab'}
        merge(make_plan('standard', ms, heads=['m']), ms, out=d/'out')
        return json.loads((d/'out/merge.json').read_text())
    def one(self, d, state, r):
        from spectrum_merging.verify import verify
        m = changed({k: v for k,v in state.items() if k!='seal'}, r)
        if isinstance(m, dict): m |= dict(seal=hashlib.sha256(json.dumps(m, sort_keys=True).encode()).hexdigest())
        raw = text_of(m, r)
        (d/'out/merge.json').write_bytes(raw)
        try: df = verify(d/'out', all=True, n_workers=1)
        except (ValueError, FileNotFoundError) as e: raise Refused(e) from e
        if not df.ok.all(): raise Refused('verify finds it')
        told = json.loads(raw)
        for k in ('outputs', 'files', 'tied', 'plan_digest'): assert told[k]==state[k], f'{k} was changed and verify says nothing'
        assert {k: v['sha256'] for k,v in told['inputs'].items()}=={k: v['sha256'] for k,v in state['inputs'].items()}

class Journal:
    def make(self, d):
        from spectrum_merging import folder, stream
        from spectrum_merging.merge import merge
        from spectrum_merging.plan import make_plan
        ms = {m: save(d/f'{m}.safetensors', model()) for m in 'ab'}
        plan = make_plan('standard', ms, heads=[])
        plan.table['reason'] = 'r'
        real = folder.write_json
        def stop(path, data): raise KeyboardInterrupt
        folder.write_json = stop # interrupts it before the manifest
        try: merge(plan, ms, out=d/'out', n_workers=1)
        except KeyboardInterrupt: pass
        finally: folder.write_json = real
        (d/'.out.partial').rename(d/'kept')
        merge(plan, ms, out=d/'want', n_workers=1)
        return plan,ms,(d/'kept/journal').read_bytes(),plain((d/'want/model.safetensors').read_bytes())
    def one(self, d, state, r):
        from spectrum_merging.merge import merge
        plan,ms,raw,want = state
        for o in ('out', '.out.partial'): shutil.rmtree(d/o, ignore_errors=True)
        shutil.copytree(d/'kept', d/'.out.partial', symlinks=True)
        new = broken(raw, r) if r.random()<.5 else raw+r.choice(['5 zz\n', f'{"9"*400} {"0"*16}\n', '-1 0000000000000000\n', '999 0000000000000000\n', f'0 {"f"*16}\n', '\0', '0 \ud800\n']).encode('utf-8', 'surrogatepass')
        (d/'.out.partial/journal').write_bytes(new)
        if r.random()<.3:
            f = d/'.out.partial/data/model.safetensors'
            f.write_bytes(broken(f.read_bytes(), r))
        merge(plan, ms, out=d/'out', n_workers=1)
        assert plain((d/'out/model.safetensors').read_bytes())==want, 'resumed into other numbers'

class SnrResults:
    def make(self, d): return {f'model.layers.{i}.mlp.up_proj': dict(snr=float(i), type='mlp.up_proj') for i in range(6)}
    def one(self, d, state, r):
        from spectrum_merging.interop import read_snr_results, write_unfrozen
        raw = text_of(changed(state, r), r)
        (d/'s.json').write_bytes(raw)
        df = read_snr_results(d/'s.json')
        told = json.loads(raw)
        flat = {k: o['snr'] for k,o in told.items() if 'snr' in o} or {k: v for o in told.values() for k,v in o.items()}
        assert dict(zip(df.name, df.snr.map(repr)))=={k+'.weight': repr(float(v)) for k,v in flat.items()}
        write_unfrozen(df, d/'u.yaml', overwrite=True)

class Unfrozen:
    names = [f'model.layers.{i}.self_attn.{o}_proj.weight' for i in range(4) for o in 'qk']
    def make(self, d): return ['unfrozen_parameters:', '- ^lm_head.weight$', '- ^model.embed_tokens.weight$', '# layers', *[f'- {o.removesuffix(".weight")}' for o in self.names[:5]],
        r'- model\.layers\.[2-3]\..*', '- (model|x).layers.1']
    def one(self, d, state, r):
        from spectrum_merging.interop import read_unfrozen
        lines = list(state)
        if r.random()<.4: lines[r.randrange(len(lines))] = '- '+''.join(r.choice(['model', '.', '*', '+', '(', ')', '|', '[a-z]', r'\w', '{2}', '?', '^', '$', '\\', 'layers', '!', '&a', '*a', '"', "'", ': ', '#', 'é', '\t']) for _ in range(r.randrange(12)))
        raw = '\n'.join(lines).encode()
        (d/'u.yaml').write_bytes(broken(raw, r) if r.random()<.6 else raw)
        found = read_unfrozen(d/'u.yaml', self.names)
        import yaml
        patterns = yaml.safe_load((d/'u.yaml').read_text(encoding='utf-8'))['unfrozen_parameters'] or []
        want = []
        for k in self.names: # only where `re` answers in time
            if any(len(p)<90 and not re.search(r'[*+}?]\)*[*+{?]|\*.*\*.*\*', p) and any(re.compile(f'(?:{p})(?=[.]|\\Z)').match(k) for _ in [0]) for p in patterns): want.append(k)
        assert set(want)<=set(found), 'it leaves out what `re` finds'

class Mergekit:
    def make(self, d): pass
    def one(self, d, state, r):
        import pandas as pd, yaml
        from spectrum_merging.interop import to_mergekit
        from spectrum_merging.plan import Plan
        parts = ['l','l.','.w','weight','*','"',"'",'é','\n',': ','#','{','%','!!x','- ','a']
        names = list(dict.fromkeys(''.join(r.choice(parts) for _ in range(r.randint(1, 4))) for _ in range(8)))
        plan = Plan(pd.DataFrame(dict(name=names, unit='u', role='matrix', op='linear', base=0., a=[r.choice([0, .25, .5, 1e-9]) for _ in names], b=.5, reason='')), dict(models=['a','b']))
        to_mergekit(plan, dict(a=r.choice(['x/y', '!!x', '../a: b', '"', 'é\n']), b='y'), d/'k.yaml', overwrite=True)
        told = yaml.safe_load((d/'k.yaml').read_text(encoding='utf-8'))['models'][0]['parameters']['weight']
        def weight(name): # as mergekit reads a setting: the first filter that is a part of the name
            return next(o['value'] for o in told if o.get('filter') in (None, '*') or o['filter'] in name) if isinstance(told, list) else told
        assert {k: weight(k) for k in names}==dict(zip(names, plan.table.a))

class Pickle:
    def make(self, d):
        import torch
        w = torch.randn(8, 16)
        torch.save({'l.weight': w, 'l.tied': w, 'l.bias': torch.randn(8)[::2], 'h': torch.ones(3).half(), 'i': torch.arange(4)}, d/'good.pt')
        return (d/'good.pt').read_bytes()
    def one(self, d, state, r):
        import torch
        from spectrum_merging.checkpoint import Checkpoint
        f = d/'x.pt'
        f.unlink(missing_ok=True) # not while an earlier one is mapped
        f.write_bytes(broken(state, r))
        ck = Checkpoint(f)
        found = {k: ck.read(k) for k in ck}
        try: want = torch.load(f, weights_only=True)
        except Exception: return # its own reader finds fault with what is not needed
        assert all(torch.equal(torch.nan_to_num(found[k].float()), torch.nan_to_num(want[k].float())) for k in found)

class Results:
    def make(self, d):
        from spectrum_merging import explore # matplotlib takes its time
        import pandas as pd
        from itertools import product
        (d/'r/scans').mkdir(parents=True)
        for of in ('weights','update'):
            for i in range(2): pd.DataFrame([dict(name=f'{u}.weight', unit=u, role='matrix', shape=(8, 16), snr=i+j/3, estimator='flip', of=of) for j,u in enumerate(('conv1','l2','l3'))]).to_csv(d/f'r/scans/{of}-{i}.csv', index=False)
        index = {of: {t: f'{of}-{i}.csv' for i,t in enumerate(('cats','dogs'))} for of in ('weights','update')}
        rows = [dict(table='reference', method=f'expert {e}, own head', task=t, accuracy=.9) for e in ('cats','dogs') for t in ('cats','dogs')]
        rows += [dict(table='grid', method=s, strategy=s, of=of, top=top, task=t, accuracy=.7, lo=.6, hi=.8, n=200, seed=0) for s,of,top,t in product(['standard','snr_winner'], ['weights','update'], [25., 50.], ['cats','dogs'])]
        pd.DataFrame(rows).to_csv(d/'r/results.csv', index=False)
        (d/'r/scans/index.json').write_text(json.dumps(index))
        return {o.relative_to(d/'r'): o.read_bytes() for o in sorted((d/'r').rglob('*')) if o.is_file()},index
    def one(self, d, state, r):
        from spectrum_merging.explore import MergePanel, decide, read_folder
        files,index = state
        for k,v in files.items(): (d/'r'/k).write_bytes(v)
        k = r.choice(list(files))
        (d/'r'/k).write_bytes(text_of(changed(index, r), r) if k.suffix=='.json' and r.random()<.7 else broken(files[k], r))
        try:
            scans,rows,experts = read_folder(d/'r')
            if r.random()<.05: MergePanel(scans, rows, experts)
            else: [decide(o, 'snr_winner') for o in scans.values()]
        except ValueError as e: raise Refused(e) from e

class Config:
    "Configuration, modules and adapters"
    def make(self, d):
        import torch, transformers
        for m in 'ab': save(d/f'{m}/model.safetensors', model())
        r,k = 2,'base_model.model.l.lora_{}.weight'
        save(d/'ad/adapter_model.safetensors', {k.format('A'): ('F32', [r, 16], floats(r, 16).tobytes()), k.format('B'): ('F32', [8, r], floats(8, r).tobytes())})
        config = dict(model_type='bert', architectures=['BertModel'], num_hidden_layers=2, hidden_size=16, id2label={'0': 'x'}, quantization_config=None, tie_word_embeddings=False)
        (d/'b/config.json').write_text(json.dumps(config))
        tokens = dict(model=dict(vocab={'a': 0, 'b': 1}), added_tokens=[dict(id=2, content='c')])
        (d/'b/tokenizer.json').write_text(json.dumps(tokens))
        adapter = dict(peft_type='LORA', r=2, lora_alpha=4, rank_pattern={}, alpha_pattern={'l': 4}, target_modules=['l'], modules_to_save=None, task_type='SEQ_CLS', base_model_name_or_path='x', use_rslora=False)
        return config,tokens,[dict(path=''), dict(path='1_Pooling')],adapter
    def one(self, d, state, r):
        from spectrum_merging.checkpoint import Checkpoint
        from spectrum_merging.preflight import name_models, preflight
        config,tokens,modules,adapter = state
        which = r.randrange(4)
        def put(i, file, o): (d/file).write_bytes(text_of(changed(o, r) if which==i else o, r) if which==i else json.dumps(o).encode())
        put(0, 'a/config.json', config); put(1, 'a/tokenizer.json', tokens); put(2, 'a/modules.json', modules); put(3, 'ad/adapter_config.json', adapter)
        try:
            if which==3: read(Checkpoint(d/'ad', d/'b'))
            else: preflight(*name_models([d/'a', d/'b']))
        except ValueError as e:
            if re.search(r'config\.json|modules\.json|tokeni|/a|/ad|token|configuration', str(e)): raise Refused(e) from e
            if type(e).__name__=='PreflightError': raise Refused(e) from e
            raise

targets = dict(safetensors=Safetensors, index=Index, plan=PlanFile, manifest=Manifest, journal=Journal, snr=SnrResults, unfrozen=Unfrozen, mergekit=Mergekit, pt=Pickle,
    results=Results, config=Config)
# What each input costs decides how many a short run takes
short = dict(safetensors=400, index=300, plan=120, manifest=60, journal=60, snr=300, unfrozen=300, mergekit=100, pt=200, results=60, config=60)

class Hang(BaseException): pass

def late(sig, frame): raise Hang(f'it takes more than {SECONDS} s')

def run(name, n, first=0):
    "Take changes `first` to `n` of a target; ends with the first fault"
    warnings.simplefilter('ignore')
    os.environ.update(HF_HUB_OFFLINE='1', OMP_NUM_THREADS='1')
    d,t = Path(tempfile.mkdtemp(prefix=f'fuzz_{name}_')),targets[name]()
    os.environ['SPECTRUM_CACHE'] = str(d/'cache')
    state = t.make(d)
    try: t.one(d, state, random.Random('warm')) # imports are done before memory is limited
    except documented: pass
    size = int(Path('/proc/self/statm').read_text().split()[0])*resource.getpagesize() if Path('/proc/self/statm').exists() else 8<<30
    # allocators reserve addresses that they never use: what is used is looked at below
    resource.setrlimit(resource.RLIMIT_AS, (size+8*MEMORY, resource.RLIM_INFINITY))
    signal.signal(signal.SIGALRM, late)
    used = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*1024
    right,refused,before = 0,0,used()
    for i in range(first, n):
        (d/'number').write_text(str(i))
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            t.one(d, state, random.Random(f'{name} {i}'))
            right += 1
        except documented as e:
            refused += 1
            text = str(e)
            if not text.strip(): sys.exit(f'{name} {i} in {d}: an error without words, {e!r}')
            if not isinstance(e, Refused) and not re.search(rf'{re.escape(str(d))}|[\w.]+\.(csv|json|yaml|safetensors|pt)', text): sys.exit(f'{name} {i} in {d}: it names no file: {text[:300]}')
        except BaseException as e:
            import traceback
            sys.exit(f'{name} {i} in {d}: {type(e).__name__}: {str(e)[:300]}\n{"".join(traceback.format_tb(e.__traceback__)[-4:])}')
        finally: signal.setitimer(signal.ITIMER_REAL, 0)
        if used()>before+MEMORY: sys.exit(f'{name} {i} in {d}: {(used()-before)/1e6:.0f} MB more were used')
    shutil.rmtree(d)
    print(f'{name}: {n-first} changes, {right} read right, {refused} refused, 0 faults')

if __name__=='__main__': run(sys.argv[1], int(sys.argv[2]), int((sys.argv+[0])[3]))
else:
    import pytest
    @pytest.mark.parametrize('name', targets)
    def test_fuzz(name, request, capsys):
        n = 10_000 if request.config.getoption('--long') else short[name]
        p = subprocess.run([sys.executable, __file__, name, str(n)], capture_output=True, text=True, env=os.environ | dict(PYTHONPATH=str(root)), timeout=20*n)
        assert p.returncode==0, (p.stdout+p.stderr)[-3000:]
        with capsys.disabled(): print(f'\n{p.stdout.strip()}', end='')
