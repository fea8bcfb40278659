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
