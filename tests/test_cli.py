"The commands as a user calls them: quick help, clear errors, folders that transformers loads."
import statistics, subprocess, sys, time
from pathlib import Path
import pytest, torch
from safetensors.torch import load_file, save_file
from spectrum_merging.merge import load_task

scripts = Path(sys.executable).parent

def run(*args, ok=True):
    p = subprocess.run([scripts/args[0], *map(str, args[1:])], capture_output=True, text=True)
    assert (p.returncode==0)==ok, p.stderr
    return p.stdout if ok else p.stderr

def test_help_is_quick():
    "`spectrum-scan --help` in at most twice the time of `import torch`"
    def clock(cmd):
        start = time.perf_counter()
        subprocess.run(cmd, check=True, capture_output=True)
        return time.perf_counter()-start
    pairs = [(clock([scripts/'spectrum-scan', '--help']), clock([sys.executable, '-c', 'import torch']))
        for _ in range(3)]
    assert statistics.median(a/b for a,b in pairs) <= 2

@pytest.fixture(scope='module')
def models(tmp_path_factory):
    "A tiny BERT and two classifiers fine-tuned from it, with 2 and 3 classes, as folders"
    from transformers import BertConfig, BertForSequenceClassification
    d = tmp_path_factory.mktemp('models')
    def make(name, labels, change):
        torch.manual_seed(0)
        m = BertForSequenceClassification(BertConfig(hidden_size=32, num_hidden_layers=2,
            num_attention_heads=2, intermediate_size=48, vocab_size=50, max_position_embeddings=16,
            num_labels=labels))
        g = torch.Generator().manual_seed(change)
        with torch.no_grad():
            for p in m.parameters(): p += change*.01*torch.randn(p.shape, generator=g)
        m.save_pretrained(d/name)
    for o in (('base', 2, 0), ('mood', 2, 1), ('topic', 3, 2)): make(*o)
    return d

def test_scan(models, tmp_path):
    out = run('spectrum-scan', models/'mood', '--base', models/'base')
    assert 'bert.encoder.layer.1.output.dense.weight' in out and 'snr' in out
    run('spectrum-scan', models/'mood', '--estimator', 'paper_nlp', '--out', tmp_path/'scan.csv')
    assert (tmp_path/'scan.csv').read_text().startswith('name,unit,role,shape,snr')
    assert 'exists' in run('spectrum-scan', models/'mood', '--out', tmp_path/'scan.csv', ok=False)

def test_merge_loads_in_transformers(models, tmp_path):
    from transformers import BertForSequenceClassification
    out = tmp_path/'merged'
    text = run('spectrum-merge', f"mood={models/'mood'}", f"topic={models/'topic'}",
        '--base', models/'base', '--strategy', 'snr_winner', '--top', 50, '--out', out)
    assert 'plan.csv' in text
    assert BertForSequenceClassification.from_pretrained(out).config.num_labels==2 # the first task, with its own head
    model = BertForSequenceClassification.from_pretrained(out/'heads'/'topic')
    assert set(load_task(out, 'topic'))==set(model.state_dict())
    model.load_state_dict(load_task(out, 'topic'))
    topic = load_file(models/'topic/model.safetensors')
    assert model.classifier.weight.equal(topic['classifier.weight'])
    again = tmp_path/'again'
    run('spectrum-merge', f"mood={models/'mood'}", f"topic={models/'topic'}",
        '--base', models/'base', '--plan', out/'plan.csv', '--out', again)
    first,second = (load_file(o/'model.safetensors') for o in (out, again))
    assert list(first)==list(second) and all(v.equal(second[k]) for k,v in first.items())

@pytest.mark.parametrize('args, says', [
    (['--strategy','sum'], "choose one of 'standard'"),
    (['--strategy','ties'], 'pass base='),
    (['--strategy','standard','--scale','2'], "no use for 'scale'"),
    (['--top','50'], "'standard' has no use for 'top'"),
    (['--estimator','mp'], "'standard' has no use for 'estimator'"),
    (['--strategy','base_reset'], 'pass base='),
    (['--threshold','3','--top','50'], 'both given'),
    (['--strategy','snr_max','--estimator','iqr'], "choose one of 'mp'"),
    (['--strategy','snr_max','--of','update'], 'needs W₀'),
    (['--protocol','paper'], 'do not fit together')])
def test_errors(models, tmp_path, args, says):
    "One message without a traceback, status 1, and nothing left behind"
    text = run('spectrum-merge', models/'mood', models/'topic', '--out', tmp_path/'out', *args,
        ok=False)
    assert says in text and 'Traceback' not in text
    assert not list(tmp_path.iterdir())

def test_nan_leaves_nothing(models, tmp_path):
    sd = load_file(models/'mood/model.safetensors')
    sd['bert.encoder.layer.0.output.dense.bias'][0] = float('nan')
    save_file(sd, tmp_path/'nan.safetensors')
    text = run('spectrum-merge', tmp_path/'nan.safetensors', models/'mood', '--out', tmp_path/'out',
        ok=False)
    assert 'bert.encoder.layer.0.output.dense.bias of a holds 1 NaN' in text
    assert [o.name for o in tmp_path.iterdir()]==['nan.safetensors']

def test_run_refuses_before_training(tmp_path):
    (tmp_path/'x').touch()
    assert 'choose another' in run('spectrum-run', 'vision', '--out', tmp_path, ok=False)
    assert 'no FashionMNIST/raw' in run('spectrum-run', 'vision', '--data', tmp_path,
        '--out', tmp_path/'out', ok=False)
