"Plans run in mergekit give the same tensors; Spectrum's files are read as they are written."
import json, pandas as pd, pytest, subprocess, sys, torch, yaml
from pathlib import Path
from spectrum_merging.checkpoint import Checkpoint
from spectrum_merging.interop import (read_snr_results, read_unfrozen, to_mergekit, write_snr_results,
    write_unfrozen)
from spectrum_merging.merge import load_task, merge
from spectrum_merging.plan import make_plan
from spectrum_merging.scan import scan

scripts = Path(sys.executable).parent

@pytest.fixture(scope='module')
def llamas(tmp_path_factory):
    from transformers import LlamaConfig, LlamaForCausalLM
    d = tmp_path_factory.mktemp('llamas')
    for i,k in enumerate(['base','a','b']):
        torch.manual_seed(i)
        LlamaForCausalLM(LlamaConfig(hidden_size=64, num_hidden_layers=12, num_attention_heads=4,
            num_key_value_heads=2, intermediate_size=96, vocab_size=100, tie_word_embeddings=False,
            max_position_embeddings=64)).bfloat16().save_pretrained(d/k)
    return d

@pytest.mark.parametrize('strategy', ['standard', 'base_reset', 'snr_weighted'])
def test_mergekit_runs_the_plan(strategy, llamas, tmp_path):
    "Equal to the last bit where products are exact, else to one unit in the last place"
    pytest.importorskip('mergekit')
    models,base = {k: llamas/k for k in 'ab'},llamas/'base'
    plan = make_plan(strategy, models, base, **(dict(of='weights', top=50) if strategy!='standard' else {}))
    assert plan.table[['base','a','b']].drop_duplicates().shape[0] > (strategy!='standard')
    file = to_mergekit(plan, models, tmp_path/'plan.yml', base=base)
    subprocess.run([scripts/'mergekit-yaml', file, tmp_path/'theirs', '--no-copy-tokenizer'], check=True,
        capture_output=True)
    theirs,ours = Checkpoint(tmp_path/'theirs'),load_task(merge(plan, models, base, tmp_path/'ours'))
    assert set(theirs)==set(ours)
    for k,v in ours.items():
        t = theirs.read(k)
        assert t.dtype==v.dtype and t.shape==v.shape
        if strategy!='snr_weighted': assert t.equal(v), k
        else: assert torch.allclose(t.float(), v.float(), rtol=2**-7, atol=0), k

def test_filters_pick_the_right_tensor(tmp_path):
    "mergekit takes the first filter that is a part of a name: layers.1 must not catch layers.11"
    names = [f'layers.{i}.w' for i in (1, 11, 111)]+['w', 'norm.w']
    sd = {k: torch.randn(4, 4) for k in names}
    for odd in names:
        plan = make_plan('standard', [sd, sd], heads=[])
        plan.table.loc[plan.table.name==odd, ['a','b']] = .9,.1
        config = yaml.safe_load(to_mergekit(plan, dict(a='A', b='B'), tmp_path/'p.yml',
            overwrite=True).read_text())
        for model,m in zip(config['models'], 'ab'):
            for k in names:
                got = model['parameters']['weight']
                if isinstance(got, list):
                    got = next(o['value'] for o in got if o.get('filter', '') in k)
                assert got==float(plan.table.set_index('name').loc[k, m])

def test_mergekit_errors(tmp_path):
    sd = {'l.weight': torch.randn(4, 4), 'fc.weight': torch.randn(2, 4)}
    plan = make_plan('standard', [sd, sd])
    with pytest.raises(ValueError, match="keeps heads of a, b; choose one"):
        to_mergekit(plan, dict(a='A', b='B'), tmp_path/'p.yml')
    to_mergekit(plan, dict(a='A', b='B'), tmp_path/'p.yml', task='b')
    with pytest.raises(FileExistsError, match='overwrite=True'):
        to_mergekit(plan, dict(a='A', b='B'), tmp_path/'p.yml', task='b')
    with pytest.raises(ValueError, match="plan merges"): to_mergekit(plan, dict(x='A', b='B'), tmp_path/'q')
    plan.table.base = .5
    with pytest.raises(ValueError, match='pass base='):
        to_mergekit(plan, dict(a='A', b='B'), tmp_path/'q', task='a')

def test_spectrum_files(llamas, tmp_path):
    "The shape of the files that Spectrum ships and axolotl reads"
    table = scan(llamas/'a', estimator='spectrum', progress=False)
    rows = json.loads(write_snr_results(table, tmp_path/'snr_results_x.json').read_text())
    assert rows['model.layers.3.self_attn.q_proj'].keys()=={'snr','type'}
    assert rows['model.layers.3.self_attn.q_proj']['type']=='self_attn.q_proj'
    text = write_unfrozen(table, tmp_path/'u.yaml', top=25).read_text()
    chosen = yaml.safe_load(text)['unfrozen_parameters']
    assert '# mlp.down_proj layers' in text and '^model\\.embed_tokens\\.weight$' in chosen
    per_kind = [o for o in chosen if o.endswith('mlp.down_proj')]
    best = table[table.name.str.contains('down_proj')].sort_values('snr').name[-3:]
    assert {o+'.weight' for o in per_kind}==set(best)
    names = read_unfrozen(tmp_path/'u.yaml', Checkpoint(llamas/'a'))
    assert set(best) <= set(names) and len(names)==len(chosen)

def test_layer_1_is_not_layer_11(tmp_path):
    (tmp_path/'u.yaml').write_text('unfrozen_parameters:\n- l.1\n- ^head.weight$\n')
    names = ['l.1.weight', 'l.1.bias', 'l.11.weight', 'head.weight', 'head.weight2']
    assert read_unfrozen(tmp_path/'u.yaml', names)==['l.1.weight', 'l.1.bias', 'head.weight']

@pytest.mark.parametrize('text', ['', '[]', 'a: b: c', 'unfrozen_parameters: [1]', 'unfrozen_parameters: ["("]',
    'unfrozen_parameters: [nowhere]'])
def test_wrong_yaml(text, tmp_path):
    (tmp_path/'u.yaml').write_text(text)
    with pytest.raises(ValueError, match='u.yaml'): read_unfrozen(tmp_path/'u.yaml', ['w'])

@pytest.mark.parametrize('text', ['', '[]', '{"a": 1}', '{"a": {"snr": 1}}', '{"a": {"snr": "x", "type": "t"}}'])
def test_wrong_json(text, tmp_path):
    (tmp_path/'s.json').write_text(text)
    with pytest.raises(ValueError, match='s.json is no snr_results file'): read_snr_results(tmp_path/'s.json')

def test_kind_by_kind_and_always_trained(tmp_path):
    "Spectrum's sorted file, and the output layer that it always trains; its two fixed lines may name nothing"
    rows = dict(q_proj={'model.layers.0.q_proj': 3., 'model.layers.1.q_proj': 1.})
    (tmp_path/'s_sorted.json').write_text(json.dumps(rows))
    got = read_snr_results(tmp_path/'s_sorted.json')
    assert got.name.tolist()==['model.layers.0.q_proj.weight','model.layers.1.q_proj.weight'] and set(got.kind)=={'q_proj'}
    for bad in ('{}', '{"q": 3}', '{"q": {"a": "x"}}'):
        (tmp_path/'bad.json').write_text(bad)
        with pytest.raises(ValueError, match='no snr_results file'): read_snr_results(tmp_path/'bad.json')
    table = got.assign(role='matrix')
    out = pd.DataFrame([dict(name='lm_head.weight', snr=0., role='matrix')])
    yml = write_unfrozen(pd.concat([table, out]), tmp_path/'u.yaml', top=50)
    names = [*got.name, 'lm_head.weight']
    assert read_unfrozen(yml, names)==['model.layers.0.q_proj.weight','lm_head.weight']
    (tmp_path/'v.yaml').write_text('unfrozen_parameters:\n- ^lm_head.weight$\n- ^model.embed_tokens.weight$\n- model.layers.1.q_proj\n')
    assert read_unfrozen(tmp_path/'v.yaml', names[:2])==['model.layers.1.q_proj.weight']
