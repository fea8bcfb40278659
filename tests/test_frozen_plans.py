"""Plans are what they were before the two planners became one: digests, coefficients and reasons, number by number.

`frozen/plans.json.gz` was written by `frozen/freeze.py` with the code of commit c000adb. SNRs are pinned in it, so that
libraries and processors cannot matter."""
import gzip, json, numpy as np, pandas as pd, pytest, torch
from pathlib import Path
from spectrum_merging.plan import make_plan

file = Path(__file__).parent/'frozen/plans.json.gz'

def state(seed, classes, loud, tied=False):
    "A network of four layers, which files sort otherwise than by depth, with norms, an embedding and a head"
    rng,sd = np.random.default_rng(seed),{}
    def new(*shape): return torch.from_numpy(rng.normal(size=shape).astype('f4'))
    for i in (0, 1, 2, 10):
        sd[f'layer.{i}.conv1.weight'] = new(12, 8, 3, 3) + loud*i*(new(12, 1)@new(1, 72)).view(12, 8, 3, 3)
        for k in ('weight', 'bias', 'running_mean'): sd[f'layer.{i}.bn1.{k}'] = new(12)
        sd[f'layer.{i}.bn1.running_var'] = new(12)**2
        sd[f'layer.{i}.bn1.num_batches_tracked'] = torch.tensor(3)
    sd['embeddings.word.weight'],sd['out_norm.weight'] = new(50, 16),new(16)
    sd['pooler.dense.weight'],sd['pooler.dense.bias'] = new(16, 16),new(16)
    sd['fc.weight'],sd['fc.bias'] = new(classes, 16),new(classes)
    if tied: sd['layer.10.conv1.weight'] = sd['layer.0.conv1.weight']
    return sd

def families():
    "`{family: (models, base)}`"
    base,a,b,c = (state(i, n, l) for i,(n,l) in enumerate(((4, 0), (2, .3), (3, .1), (5, .2))))
    ta,tb,tbase = (state(i, n, .2, True) for i,n in ((5, 2), (6, 3), (7, 4)))
    same,other = state(8, 2, .2),state(9, 2, .1)
    return dict(two=(dict(a=a, b=b), base), three=(dict(a=a, b=b, c=c), base), tied=(dict(a=ta, b=tb), tbase),
        pair=(dict(a=same, b=other), state(10, 2, 0)),
        tied_pair=(dict(a=state(11, 2, .1, True), b=state(12, 2, .2, True)), state(13, 2, 0, True)))

def scans_of(kept, estimator, of):
    "Pinned scans as tables"
    return {m: pd.DataFrame(dict(name=list(o), snr=[float.fromhex(v) for v in o.values()], estimator=estimator, of=of))
        for m,o in kept.items()}

frozen = json.loads(gzip.decompress(file.read_bytes())) if file.is_file() else dict(plans=[], scans={})
kept = families()

def made(strategy, family, base, scans, **options):
    "The plan of a stored call"
    models,has = kept[family]
    if scans:
        _,estimator,of = scans.split()
        # What was the default then is not the default now.
        options = dict(estimator=estimator) | options | dict(scans=scans_of(frozen['scans'][scans], estimator, of))
    return make_plan(strategy, models, has if base else None, **options)

def test_enough(): assert len(frozen['plans'])>=220

@pytest.mark.parametrize('old', frozen['plans'], ids=lambda o: ' '.join(map(str, o['call'].values())))
def test_same_plan(old):
    new = made(**old['call'])
    names = ['name','unit','role','op','reason']
    assert new.table[names].to_numpy().tolist()==[[frozen['words'][i] for i in r[:5]] for r in old['rows']]
    coefs = [[float.fromhex(frozen['words'][i]) for i in r[5:]] for r in old['rows']]
    got = new.table[['base',*new.models]].to_numpy(float)
    if old['exact']:
        assert got.tolist()==coefs
        assert new.digest==old['digest']
    else: np.testing.assert_allclose(got, coefs, rtol=1e-12) # exp and log differ in the last bit between processors
