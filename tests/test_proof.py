"A merge is proved on another machine: other kernels of BLAS, other orders of additions, flipped bits. `--long` for 10,000 of them."
import json, os, subprocess, sys
from pathlib import Path
import numpy as np, pytest
from safetensors.numpy import load_file, save_file
from spectrum_merging.arithmetic import Scratch, number_types, storage, weighted_sum, widen
from spectrum_merging.bounds import Unproved, cut
from spectrum_merging.factors import distance, gram_svd, norm, polar, products, svd_standard, total
from spectrum_merging.folder import sealed
from spectrum_merging.operations import operation_bound, run_operation
from spectrum_merging.rules import recipe, rule_names
from spectrum_merging.stream import word_sum
from spectrum_merging.verify import compare, verify

kernels = ['Haswell', 'Sandybridge', 'Nehalem']
ops = ['tsv_m', 'tsv_m(rank=6)', 'tsv_m(rank=edge)', 'tsv_m(share=1.0)', 'iso_c', 'iso_c(beta=0.3)', 'iso_c(rank=5)', 'iso_c(rank=edge)', 'iso_cts',
    'iso_cts(common=0.5)', 'iso_cts(rank=6)', 'iso_cts(rank=edge)', 'ridge_mean', 'ridge_mean(eps=0.001)', 'regmean', 'regmean(alpha=1.0)',
    'shrink_mean', 'shrink_mean(estimator=flip)', 'ties', 'dare', 'slerp']
same = {'linear', 'ties', 'dare', 'slerp'} # whose order is their own

@pytest.fixture(scope='module')
def long(request): return request.config.getoption('--long', False)

def pair(shape, seed=0, kind='noise', rank=6):
    "A base and two models: updates are directions in noise, directions alone, or of one strength in all directions"
    rng,(m,n) = np.random.default_rng(seed),shape
    base = rng.standard_normal(shape)*.05
    def update():
        low = .007*rng.standard_normal((m, rank))@rng.standard_normal((rank, n))
        if kind=='low': return low
        if kind=='level': return .01*np.linalg.qr(rng.standard_normal((max(shape), min(shape))))[0].reshape(-1)[:m*n].reshape(shape)
        return low+.002*rng.standard_normal(shape)
    return base,[base+update() for _ in 'ab']

def moments(n, seed=0):
    rng = np.random.default_rng(seed)
    def one():
        x = rng.standard_normal((n, 3*n))
        return x@x.T/len(x)
    return [one(), one()]

def run(code, *args, kernel=None):
    env = os.environ | (dict(OPENBLAS_CORETYPE=kernel) if kernel else {})
    p = subprocess.run([sys.executable, '-c', code, *map(str, args)], env=env, capture_output=True, text=True)
    assert not p.returncode, p.stderr
    return p.stdout

making = '''
import sys
from pathlib import Path
from spectrum_merging.merge import merge
from spectrum_merging.plan import make_plan
at,dtype,ops = Path(sys.argv[1]),sys.argv[2],sys.argv[3].split(',')
models,base = {k: at/f'{k}.safetensors' for k in 'ab'},at/'base.safetensors'
plan = make_plan('iso_c', models, base)
names = sorted(plan.table.name)
for i,op in enumerate(ops):
    row = plan.table.name.isin([o for o in names if o.split('.')[0]==f'l{i:02}'])
    plan.table.loc[row, 'op'] = op
    plan.table.loc[row, ['base', 'a', 'b']] = [0., .5, .5] if op=='slerp' else [1., 1., 1.]
merge(plan, models, base, at/f'out_{dtype}', dtype=dtype, grams={k: at/f'grams_{k}.safetensors' for k in 'ab'})
'''
proving = '''
import sys
from spectrum_merging.verify import verify
print(verify(sys.argv[1], all=True).to_json(orient='records'))
'''

def inputs(at, shapes):
    "Models with a tensor per operation and shape, and the moments of their inputs"
    files = {k: {} for k in ('base', 'a', 'b', 'grams_a', 'grams_b')}
    for i,op in enumerate(ops):
        for j,(shape,kind) in enumerate(shapes):
            name,(base,two),grams = f'l{i:02}.{j}.weight',pair(shape, 10*i+j, kind),moments(shape[1], i)
            for k,x in zip(files, (base, *two, *grams)): files[k][name] = x.astype('f4')
    for k,v in files.items(): save_file(v, at/f'{k}.safetensors')

@pytest.fixture(scope='module')
def merged(tmp_path_factory, long):
    at = tmp_path_factory.mktemp('proof')
    small = [((48, 80), 'noise'), ((40, 40), 'noise'), ((60, 24), 'low')]
    inputs(at, small+[((384, 512), 'noise'), ((256, 256), 'noise'), ((512, 96), 'low')]*long)
    for dtype in ('float32', 'bfloat16')+('float16', 'float64')*long: run(making, at, dtype, ','.join(ops), kernel='Haswell')
    return at

def test_all_rules_are_here(): assert {recipe(o).rule.name for o in ops}==set(rule_names('matrix'))

@pytest.mark.parametrize('kernel', kernels)
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16', 'float64'])
def test_other_kernels(merged, dtype, kernel, long):
    if not (merged/f'out_{dtype}').exists(): pytest.skip('--long')
    found = json.loads(run(proving, merged/f'out_{dtype}', kernel=kernel))
    assert all(o['ok'] for o in found), [o for o in found if not o['ok']]
    tensors = [o for o in found if o['tensor']]
    if kernel=='Haswell': assert {o['found'] for o in tensors}=={'same bits'}
    assert {o['found'] for o in tensors if o['rule'].split('(')[0].split()[0] in same}<={'same bits'}
    for o in tensors: print(dtype, kernel, ops[int(o['tensor'][1:3])], o['tensor'], o['found'])

# --- Flipped bits

def resealed(out):
    "The manifest of a folder with the checksums of what is there now, and a fresh seal"
    told = json.loads((out/'merge.json').read_text())
    for f,o in told['outputs'].items():
        n = int.from_bytes((out/f).read_bytes()[:8], 'little')
        head = json.loads((out/f).read_bytes()[8:8+n])
        raw = np.frombuffer((out/f).read_bytes()[8+n:], 'u1')
        for k in o['checksums']:
            a,b = head[k]['data_offsets']
            o['checksums'][k] = f'{word_sum(raw[a:b]):016x}'
    (out/'merge.json').write_text(json.dumps(told | dict(seal=sealed(told))))

def bits_of(dtype):
    "`{part of the number: its bits}`"
    o = number_types[dtype]
    return dict(sign=[o.bits-1], exponent=list(range(o.mantissa, o.bits-1)), mantissa=list(range(o.mantissa)))

def made(op, shape, kind, dtype, seed=0):
    "Stored numbers of one machine, fp64 numbers of another (rows and columns in another order), and how far they may be apart"
    base,two = pair(shape, seed, kind)
    base,two,grams = np.float32(base),[np.float32(o) for o in two],moments(shape[1], seed)
    what,coefs = recipe(op),[.5, .5] if op=='slerp' else [1., 1.]
    x = run_operation(what, two, base, coefs, grams).reshape(-1)
    most,why = operation_bound(what, two, base, coefs, grams)
    stored = weighted_sum([x], ['float64'], [1.], dtype, Scratch(x.size))[0].copy()
    return stored,x,most,why

def test_flipped_bits(long):
    "What refuses each: the checksum all of them, the bound all that are above it, with checksums and seal made to fit"
    rng,n,seen = np.random.default_rng(0),10_000 if long else 600,dict(sign=[], exponent=[], mantissa=[])
    cases = [(op, shape, kind, dtype) for op in ops for shape,kind in (((48, 80), 'noise'), ((60, 24), 'low')) for dtype in ('float32', 'bfloat16')]
    for op,shape,kind,dtype in cases:
        stored,x,most,_ = made(op, shape, kind, dtype)
        assert compare(stored, x, most, dtype)[0].all() # the honest one
        whole,size = word_sum(stored),8*stored.itemsize
        for part,bits in bits_of(dtype).items():
            for at,bit in zip(rng.integers(stored.size, size=n//len(cases)//3+1), rng.choice(bits, n//len(cases)//3+1)):
                bad = stored[at:at+1].copy()
                bad.view(f'u{bad.itemsize}')[0] ^= np.array(1<<int(bit), f'u{bad.itemsize}')
                after = stored.copy()
                after[at] = bad[0]
                assert word_sum(after)!=whole # the checksum in the manifest
                with np.errstate(all='ignore'): far = abs(widen(bad, dtype)-x[at])[0]
                refused = not compare(bad, x[at:at+1], most, dtype)[0][0]
                step = np.spacing(np.float32(abs(x[at])))*2.**(23-number_types[dtype].mantissa)
                # above the bound and what rounding to the stored type adds, each is refused; zeros have a sign, which is no distance
                if not far <= most+1e-15*abs(x[at])+step: assert refused, (op, dtype, part, bit, far, most)
                seen[part].append(refused)
    count = {k: (len(v), sum(v)) for k,v in seen.items()}
    print('flipped, refused by the bound alone:', count)
    assert sum(len(v) for v in seen.values())>=n
    assert count['sign'][1]>.9*count['sign'][0] and count['exponent'][1]>.9*count['exponent'][0]

@pytest.mark.parametrize('bit', [31, 30, 27, 23, 18])
def test_flipped_in_a_file(tmp_path, bit):
    "`spectrum-verify` refuses by the checksum; where checksum and seal were made again, by the bound"
    base,two = pair((48, 80))
    for k,x in zip(('base', 'a', 'b'), (base, *two)): save_file({'l00.0.weight': x.astype('f4')}, tmp_path/f'{k}.safetensors')
    for k in 'ab': save_file({'l00.0.weight': np.eye(80, dtype='f4')}, tmp_path/f'grams_{k}.safetensors')
    run(making, tmp_path, 'float32', 'tsv_m')
    out = tmp_path/'out_float32'
    data = bytearray((out/'model.safetensors').read_bytes())
    data[-400+bit//8] ^= 1<<bit%8
    (out/'model.safetensors').write_bytes(data)
    found = verify(out, all=True)
    assert found[~found.ok].found.str.startswith('other checksum').all() and (~found.ok).sum()==1
    resealed(out)
    found = verify(out, all=True)
    assert found[~found.ok].found.str.startswith('differs').all() and (~found.ok).sum()==1

# --- What the bounds say is so

@pytest.mark.parametrize('op', [o for o in ops if o not in same])
def test_other_orders(op, long):
    "Rows and columns in another order are another machine; models in another order, too, where the rule adds them"
    for seed in range(12 if long else 1):
        for shape,kind in (((24, 40), 'noise'), ((30, 30), 'noise'), ((40, 18), 'low'), ((16, 16), 'level'), ((1, 12), 'noise'), ((2, 3), 'noise')):
            rng = np.random.default_rng(seed)
            base,two = pair(shape, seed, kind)
            grams,what = moments(shape[1], seed),recipe(op)
            if 'edge' in op or 'flip' in op: continue # whose random signs are those of places
            here,(most,why) = run_operation(what, two, base, [1., 1.], grams),operation_bound(what, two, base, [1., 1.], grams)
            r,c = rng.permutation(shape[0]),rng.permutation(shape[1])
            there = np.empty(shape)
            there[np.ix_(r, c)] = run_operation(what, [o[np.ix_(r, c)] for o in two], base[np.ix_(r, c)], [1., 1.], [o[np.ix_(c, c)] for o in grams])
            off = abs(here-there).max()
            assert off <= most+2.**-51*abs(here).max(), (op, shape, kind, seed, off, most, why)

def test_the_exact_result():
    "With 60 digits: each machine is within the bound of what is exact"
    mp = pytest.importorskip('mpmath').mp
    mp.dps = 60
    rng = np.random.default_rng(0)
    d = rng.normal(size=(5, 8))*[[1], [1], [.1], [.01], [.01]]
    U,S,V = mp.svd_r(mp.matrix(d.tolist()))
    for k,beta in ((5, 1.), (2, 1.), (3, 0.), (4, .5)):
        s = [S[i] for i in range(k)]
        w = [(1-beta)*o+beta*sum(s)/k for o in s]
        exact = np.array([[float(sum(U[i,a]*w[a]*V[a,j] for a in range(k))) for j in range(8)] for i in range(5)])
        what = recipe(f'iso_c(beta={beta}, rank={k})')
        most,_ = operation_bound(what, [d], 0*d, [1.])
        assert abs(run_operation(what, [d], 0*d, [1.])-exact).max() <= most < 1e-9

def test_equally_strong():
    "Where it is rounding's choice which direction is kept, that is said, and signs and exponents are still held to the result's size"
    d = np.diag([4., 3, 3, 1])@np.eye(4, 9)
    with pytest.raises(Unproved, match='directions 2 and 3 are equally strong'): cut(d, 2)
    what = recipe('tsv_m(rank=2)')
    most,why = operation_bound(what, [d, d[:,::-1]], 0*d, [1., 1.])
    x = run_operation(what, [d, d[:,::-1]], 0*d, [1., 1.])
    assert 'equally strong' in why and abs(x).max() < most < 60
    huge = np.float32(x.reshape(-1))
    huge.view('u4')[0] ^= 1<<29 # 4 becomes 7e19
    assert not compare(huge, x.reshape(-1), most, 'float32')[0][0]

def test_sums_and_products_of_their_own_order():
    rng = np.random.default_rng(0)
    a,b = rng.normal(size=(2, 70, 70))*10.**rng.integers(-3, 3, (2, 70, 70))
    order = rng.permutation(70)
    assert np.array_equal(products(a, b)[0], products(a[:,order], b[order])[0])
    high,low,off = products(a, b)
    exact = np.array([[float(sum(int(x*2**80)*int(y*2**80) for x,y in zip(r, c))) for c in b.T[:6]] for r in a[:6]])/2.**160
    assert abs(exact-(high+low)[:6,:6]).max() <= off+2.**-52*abs(exact).max()
    assert abs(total(a)-a.sum())<1e-9 and abs(norm(a)-np.linalg.norm(a))<1e-9
    assert 69.9e-6 < distance(a, b, a@b+1e-6) < 72e-6 # from above
    u,s,v = gram_svd(a)
    assert np.linalg.norm((u*s)@v-a) < 4*svd_standard(a) and abs(polar(a)@polar(a).T-np.eye(70)).max()<1e-9

def test_what_computed_it(merged):
    told = json.loads((merged/'out_float32'/'merge.json').read_text())['computed_with']
    assert set(told)=={'numpy', 'blas'} and 'Haswell' in told['blas']
