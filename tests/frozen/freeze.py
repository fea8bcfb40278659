"""Write `plans.json.gz`. It was run once, at commit c000adb, when there were two planners:
    PYTHONPATH=<checkout of c000adb>:tests python tests/frozen/freeze.py"""
import gzip, json, sys
from pathlib import Path
from test_frozen_plans import families
from spectrum_merging.checkpoint import Checkpoint
from spectrum_merging.plan import is_update_rule, make_plan, update_plan
from spectrum_merging.scan import scan

kept = families()
heads = ['fc','pooler']
words,scans,plans,seen = {},{},[],{}

def word(text): return words.setdefault(text, len(words))

def pinned(family, estimator, of):
    "Name of scans, measured once"
    key = f'{family} {estimator} {of}'
    if key not in scans:
        models,base = kept[family]
        seen[key] = {m: scan(o, base if of=='update' else None, estimator=estimator, of=of, progress=False)
            for m,o in models.items()}
        scans[key] = {m: {k: float(v).hex() for k,v in zip(df.name, df.snr)} for m,df in seen[key].items()}
    return key

def keep(strategy, family, base=True, scans=None, **options):
    "One plan"
    models,has = kept[family]
    how = options if scans is None else options|dict(scans=seen[scans])
    f = update_plan if is_update_rule(strategy) else make_plan
    plan = f(strategy, models, has if base else None, **how)
    cols = ['base',*plan.models]
    rows = [[word(r[k]) for k in ('name','unit','role','op','reason')] + [word(float(r[k]).hex()) for k in cols]
        for r in plan.table.to_dict('records')]
    plans.append(dict(call=dict(strategy=strategy, family=family, base=base, scans=scans)|options,
        digest=plan.digest, exact=not strategy.startswith('snr_gate'), rows=rows))

cuts = dict(top=25),dict(top=50),dict(top=100),dict(threshold=.5),{}
guided = 'base_reset','snr_winner','snr_max','snr_weighted'
sided = 'snr_lowA','snr_lowB'
updates = ('task_arithmetic','lines','lines(slope=-1)','snr_gate','snr_gate(tau=.5, power=2)','ridge_mean(eps=0.1)','tsv_m',
    'tsv_m(share=.5)','iso_c(beta=.3)','regmean','regmean(alpha=.7)','shrink_mean','ties(density=.2)',
    'dare(density=0.5,seed=3)','slerp')
for family in ('two','three'):
    for of in ('weights','update'):
        key = pinned(family, 'mp', of)
        for s in guided+(sided if family=='two' else ()):
            for cut in cuts: keep(s, family, scans=key, of=of, **cut)
    keep('standard', family)
    keep('standard', family, base=False)
    key = pinned(family, 'mp', 'weights')
    keep('snr_winner', family, base=False, scans=key) # without a base the weights are measured
    for r in updates:
        how = dict(scans=pinned(family, 'mp', 'update')) if r.startswith('snr_gate') else {}
        for scale in ({}, dict(scale=.7), dict(scale=-.25) if r!='slerp' else dict(scale=.25)): keep(r, family, **how, **scale)
for family in ('pair','tied_pair'): # the paper's own rules, for which heads have one shape
    for e in ('paper_nlp','paper_vision','mp'):
        key = pinned(family, e, 'weights')
        for s in ('snr_winner','base_reset',*sided):
            for cut in (dict(top=25), dict(top=100), dict(threshold=3)):
                keep(s, family, scans=key, estimator=e, protocol='paper', **cut)
    keep('standard', family, base=False, protocol='paper')
    key = pinned(family, 'mp', 'update')
    keep('snr_weighted', family, scans=key, of='update', protocol='paper', top=50)
    for e in ('paper_vision','spectrum'): # other estimators, whole layers
        keep('snr_winner', family, scans=pinned(family, e, 'weights'), estimator=e, of='weights', threshold=3)
    for h in ([], heads):
        for s in ('standard','snr_winner','base_reset'):
            keep(s, family, heads=h, scans=None if s=='standard' else pinned(family, 'mp', 'update'))
        for r in ('task_arithmetic','lines','snr_gate','ridge_mean','ties','slerp','regmean'):
            keep(r, family, heads=h, **(dict(scans=key) if r=='snr_gate' else {}))
key = pinned('tied', 'mp', 'update')
for s in ('standard','snr_winner','base_reset','snr_max'):
    keep(s, 'tied', **({} if s=='standard' else dict(scans=key)))
for r in updates: keep(r, 'tied', **(dict(scans=key) if r.startswith('snr_gate') else {}))

text = json.dumps(dict(words=list(words), scans=scans, plans=plans), ensure_ascii=False, separators=(',', ':'))
file = Path(__file__).parent/'plans.json.gz'
file.write_bytes(gzip.compress(text.encode(), mtime=0))
print(len(plans), 'plans', file.stat().st_size, 'bytes', file=sys.stderr)
