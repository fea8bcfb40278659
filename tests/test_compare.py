"From folders and tables to one judged merge: other architectures, labels, columns; nothing differs, averaging fails; bad input; going on."
import json, subprocess, sys
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from tokenizers import Tokenizer, models as tm, pre_tokenizers, processors
from transformers import (AutoModel, AutoModelForSequenceClassification, DistilBertConfig, ElectraConfig, PreTrainedTokenizerFast, RobertaConfig)
from spectrum_merging import candidates, classifiers, compare as module
from spectrum_merging.parallel import quiet
from spectrum_merging.compare import compare
from spectrum_merging.merge import load_model
from spectrum_merging.own_data import class_numbers, own_data
from spectrum_merging.unlabelled import read_table
from spectrum_merging.verify import verify

moods = {'awful': ['bad','vile','poor'], 'So-so': ['fair','plain','usual'], 'Great Fun': ['good','bright','sweet']}
topics = {k: [f'{k}{i}' for i in range(3)] for k in ('sea','sky','war','law','art')}
filler = [f'w{i}' for i in range(24)]
special = ['[PAD]','[UNK]','[CLS]','[SEP]']
words = special+filler+sum([*moods.values(), *topics.values()], [])

def tokenizer(words=words):
    tok = Tokenizer(tm.WordLevel({w: i for i,w in enumerate(words)}, '[UNK]'))
    tok.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tok.post_processor = processors.TemplateProcessing(single='[CLS] $A [SEP]', special_tokens=[('[CLS]', 2), ('[SEP]', 3)])
    return PreTrainedTokenizerFast(tokenizer_object=tok, pad_token='[PAD]', unk_token='[UNK]', cls_token='[CLS]', sep_token='[SEP]')

def texts(n, seed):
    "Texts that hold a word of a mood and one of a topic: `(text, mood, topic)`"
    rng = np.random.default_rng(seed)
    res = []
    for _ in range(n):
        m,t = rng.choice(list(moods)),rng.choice(list(topics))
        o = [*rng.choice(filler, 3), rng.choice(moods[m]), rng.choice(topics[t])]
        res.append((' '.join(rng.permutation(o)), str(m), str(t)))
    return res

kinds = dict(
    distilbert=DistilBertConfig(vocab_size=len(words), dim=32, n_layers=1, n_heads=2, hidden_dim=64, max_position_embeddings=32, dropout=0., seq_classif_dropout=0.),
    roberta=RobertaConfig(vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, max_position_embeddings=34,
        pad_token_id=0, hidden_dropout_prob=0., attention_probs_dropout_prob=0.),
    electra=ElectraConfig(vocab_size=len(words), embedding_size=32, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=32, hidden_dropout_prob=0., attention_probs_dropout_prob=0.))

def with_head(base, names):
    return AutoModelForSequenceClassification.from_pretrained(base, num_labels=len(names), id2label=dict(enumerate(names)),
        label2id={o: i for i,o in enumerate(names)})

def train(pairs, steps, lr, seed=0):
    "Train modules on `(module, texts, classes)`; bodies that they share learn from all"
    tok,g = tokenizer(),torch.Generator().manual_seed(seed)
    params = list({id(p): p for m,*_ in pairs for p in m.parameters()}.values())
    opt = torch.optim.AdamW(params, lr, weight_decay=0.)
    sets = [(m, tok(x, return_tensors='pt', padding=True), torch.tensor(y)) for m,x,y in pairs]
    for i in range(steps):
        for g_ in opt.param_groups: g_['lr'] = lr*min(1, (i+1)/10, (steps-i)/10)
        loss = 0.
        for m,x,y in sets:
            ix = torch.randint(len(y), (64,), generator=g)
            loss = loss+torch.nn.functional.cross_entropy(m(input_ids=x['input_ids'][ix], attention_mask=x['attention_mask'][ix]).logits, y[ix])
        opt.zero_grad()
        loss.backward()
        opt.step()

def tables(d, seed=5):
    "CSV with 400 rows and odd columns for the moods, JSON lines with numbers for the topics"
    rows = texts(400, seed)
    pd.DataFrame(dict(nr=range(400), who=[f'user{i%7}' for i in range(400)], snippet=[o[0] for o in rows],
        verdict=[o[1].replace('-', ' ').upper() for o in rows])).to_csv(d/'mood.csv', index=False, sep=';')
    rows = texts(400, seed+1)
    pd.DataFrame(dict(post=[o[0] for o in rows], code=[list(topics).index(o[2]) for o in rows])).to_json(d/'topic.jsonl', orient='records', lines=True)
    return dict(mood=d/'mood.csv', topic=d/'topic.jsonl')

def make(d, kind, close):
    "Base and two experts; `close`: experts are the base's body with almost nothing changed, otherwise each went its own way"
    d.mkdir()
    torch.manual_seed(0)
    with quiet():
        body = AutoModel.from_config(kinds[kind])
        body.save_pretrained(d/'base')
        a,b = with_head(d/'base', list(moods)),with_head(d/'base', list(topics))
        rows = texts(600, 1)
        x,ya,yb = [o[0] for o in rows],[list(moods).index(o[1]) for o in rows],[list(topics).index(o[2]) for o in rows]
        if close:
            setattr(b, b.base_model_prefix, a.base_model)
            train([(a, x, ya), (b, x, yb)], 100, 2e-3)
            a.base_model.save_pretrained(d/'base')
            a.save_pretrained(d/'mood')
            with torch.no_grad():
                for p in b.base_model.parameters(): p.add_(1e-5*torch.randn_like(p))
            b.save_pretrained(d/'topic')
        else:
            for seed,(m,y,t) in enumerate(((a, ya, 'mood'), (b, yb, 'topic'))):
                train([(m, x, y)], 80, 4e-3, seed)
                m.save_pretrained(d/t)
        for o in 'base','mood','topic': tokenizer().save_pretrained(d/o)
    return dict(mood=d/'mood', topic=d/'topic'),d/'base',tables(d)

@pytest.fixture(scope='module')
def home(tmp_path_factory):
    d = tmp_path_factory.mktemp('compare')
    with pytest.MonkeyPatch.context() as m:
        m.setenv('SPECTRUM_CACHE', str(d/'cache'))
        yield d

@pytest.fixture(scope='module')
def close(home): return make(home/'close', 'distilbert', True)

@pytest.fixture(scope='module')
def apart(home): return make(home/'apart', 'electra', False)

def test_nothing_differs(close, home):
    "The report says so, and keeps the merge that is simplest"
    said = []
    table = compare(*close, home/'out', say=said.append)
    assert table.mean_share[table.row=='experts'].item()==1 and table['mood'][table.row=='experts'].item() > .6
    report = (home/'out'/'report.md').read_text()
    assert 'No merge differs significantly from plain averaging' in report and 'cannot be told from the experts' in report
    assert "texts are column 'snippet'" in said[0] and "'verdict' (names" in said[0]
    assert "texts are column 'post'" in said[1] and "'code' (numbers" in said[1]
    assert {o.name for o in (home/'out').iterdir()} >= {'table.csv','per_task.csv','figure.png','report.md','best.json','best.plan.csv','merged'}
    assert json.loads((home/'out/best.json').read_text())['row']=='average'
    assert '1. Best on the' in (home/'out/merged/README.md').read_text()
    assert verify(home/'out'/'merged', all=True).ok.all()
    assert load_model(home/'out'/'merged', 'topic').config.id2label[4]=='art'

def test_made_elsewhere(apart, home):
    "A body that another tool averaged, with one task's head, is asked under each expert's own"
    models,base,data = apart
    with quiet(): a,b = (AutoModelForSequenceClassification.from_pretrained(o) for o in models.values())
    with torch.no_grad():
        for p,q in zip(a.base_model.parameters(), b.base_model.parameters()): p.copy_((p+q)/2)
    a.save_pretrained(home/'theirs')
    table = compare(models, base, data, home/'also', quick=True, also=dict(theirs=home/'theirs'), say=lambda o: None).set_index('row')
    assert table.loc['theirs', ['mood','topic']].equals(table.loc['average', ['mood','topic']])
    done = subprocess.run([sys.executable, '-c', 'import sys; from spectrum_merging.cli import compare_cli; sys.exit(compare_cli())',
        *[f'{t}={o}' for t,o in models.items()], '--base', str(base), '--data', *[f'{t}={o}' for t,o in data.items()], '--quick',
        '--also', str(home/'theirs'), '--out', str(home/'unnamed')], capture_output=True, text=True)
    assert done.returncode==2 and 'name each, for instance' in done.stderr

def test_averaging_fails(apart, home):
    "The report says so; what repairs do is significant"
    table = compare(*apart, home/'fails', say=lambda o: None).set_index('row')
    report = (home/'fails'/'report.md').read_text()
    assert table.mood['experts']>.9 and table.topic['experts']>.9
    assert table.mean_share['average']<.8 and 'Plain averaging fails' in report
    better = [k for k,r in table.iterrows() if r.p_holm<.05 and r.difference>0 and r.kind=='repair']
    sentence = next(o for o in report.splitlines() if o.startswith('3. '))
    assert better and all(k in sentence for k in better)
    assert not [k for k,r in table.iterrows() if not r.p_holm<.05 and k!='average' and r.kind in ('merge','SNR','repair') and f'{k} (' in sentence]
    best = json.loads((home/'fails/best.json').read_text())
    assert best['repairs'] and 'unlabelled inputs' in report
    assert verify(home/'fails'/'merged', all=True).ok.all()
    assert load_model(home/'fails'/'merged', 'mood').config.id2label[1]=='So-so'

def test_goes_on(apart, home, monkeypatch):
    "A second start asks for no row again, and finds the same"
    first = pd.read_csv(home/'fails'/'table.csv')
    asked = []
    real = candidates.Bench.ask
    monkeypatch.setattr(candidates.Bench, 'ask', lambda self, models, part: asked.append(part) or real(self, models, part))
    compare(*apart, home/'again', say=lambda o: None)
    second = pd.read_csv(home/'again'/'table.csv')
    assert not asked and first.equals(second)

def without(models, **other): return {k: o for k,o in (models | other).items() if o is not None}

def refused(args, home, said, **how):
    "One line, and nothing is written"
    out = home/'refused'
    with pytest.raises((ValueError, OSError), match=said): compare(*args, out, say=lambda o: pytest.fail(o), **how)
    assert not out.exists()

def test_refuses_data(apart, home, tmp_path):
    models,base,data = apart
    df = pd.read_csv(data['mood'], sep=';')
    def with_table(df, name='x.csv', **how):
        df.to_csv(tmp_path/name, index=False, **how)
        return models,base,data | dict(mood=tmp_path/name)
    refused(with_table(df.head(39)), home, 'has 39 rows with an input and a label')
    refused(with_table(df.assign(verdict='unheard of'), 'u.csv'), home, "no column holds labels that the expert knows|'unheard of'")
    refused(with_table(df.rename(columns=dict(verdict='label')).assign(label=lambda o: o.label.where(o.index>3, 'odd'))), home, "labels 'odd' are not known")
    refused(with_table(df[['snippet']]), home, 'no column holds labels')
    refused(with_table(df[['verdict']]), home, 'has no column of texts')
    refused(with_table(df[['snippet','verdict']], header=False), home, 'first line seems to be a row')
    refused(apart, home, "has no column 'nothing'", text=dict(mood='nothing'))
    refused(apart, home, 'names .other., which is no task', label=dict(other='x'))
    refused((models, base, without(data, topic=None)), home, "task 'topic' has no data")
    refused((models, base, data | dict(other=data['mood'])), home, "'other', which is no task")
    (tmp_path/'x.xlsx').write_bytes(b'PK')
    refused((models, base, data | dict(mood=tmp_path/'x.xlsx')), home, 'no table that is known')
    refused((models, base, data | dict(mood=tmp_path/'gone.csv')), home, 'is no file')
    (tmp_path/'l.csv').write_bytes('snippet,verdict\nschön,awful\n'.encode('latin-1'))
    refused((models, base, data | dict(mood=tmp_path/'l.csv')), home, 'not in UTF-8')
    refused(apart, home, 'pass a time like 10m', budget='soon')

def test_refuses_models(apart, close, home, tmp_path, monkeypatch):
    models,base,data = apart
    refused((models | dict(topic=close[0]['topic']), base, data), home, 'differ|fit together')
    refused((models, close[1], data), home, 'fit together')
    refused((dict(mood=models['mood']), base, dict(mood=data['mood'])), home, 'pass two or more')
    refused((models | dict(topic=base), base, data), home, 'pass a …ForSequenceClassification')
    with pytest.raises(FileExistsError, match='is not empty'): compare(*apart, base)
    other = tmp_path/'other'
    import shutil
    shutil.copytree(models['topic'], other)
    with quiet(): tokenizer(special+words[:3:-1]).save_pretrained(other)
    refused((models | dict(topic=other), base, data), home, 'tokenizers of mood and topic differ')
    (tmp_path/'adapter').mkdir()
    (tmp_path/'adapter'/'adapter_config.json').write_text('{}')
    refused((models | dict(topic=tmp_path/'adapter'), base, data), home, 'topic: .* is an adapter: merge it into its base')
    monkeypatch.setattr(module, 'free_memory', lambda: 1000)
    refused(apart, home, 'GB are free')

def test_labels():
    names = ['1','2','3']
    assert list(class_numbers(['1','3'], names)[0])==[0, 2] # names come before numbers
    assert list(class_numbers(['0','2'], names)[0])==[0, 2] and class_numbers(['0','2'], names)[1]=='numbers'
    with pytest.raises(ValueError, match="'4' are not known"): class_numbers(['1','4'], names)
    assert list(class_numbers(['no','NO'], ['no','NO'])[0])==[0, 1] # case is all that tells them apart
    with pytest.raises(ValueError): class_numbers(['3'], ['LABEL_0','LABEL_1','LABEL_2'])

@pytest.mark.parametrize('kind', ('csv','tsv','jsonl','json','parquet'))
def test_tables(kind, tmp_path):
    df,f = pd.DataFrame(dict(a=['x, y','"q"',''], b=[1, 0, 2])),tmp_path/f't.{kind}'
    if kind in ('csv','tsv'): df.to_csv(f, index=False, sep=',' if kind=='csv' else '\t')
    elif kind=='parquet': df.to_parquet(f)
    else: df.to_json(f, orient='records', lines=kind=='jsonl')
    found = read_table(f)
    assert list(found['a'])==['x, y','"q"',''] and [*map(str, found['b'])]==['1','0','2']

def test_budget_names_what_is_left_out(apart, home):
    said = []
    table = compare(*apart, home/'short', budget='1s', seed=3, say=said.append)
    assert {'experts','base','average'} <= {*table.row} and any('left out: ' in o for o in said)
    assert '## Left out' in (home/'short'/'report.md').read_text()

def test_command(apart, home):
    "One command; the table is on the disk, stderr holds no bar where nobody looks"
    models,base,data = apart
    (home/'script.py').write_text('import sys\nfrom spectrum_merging.cli import compare_cli\nsys.exit(compare_cli())\n')
    cmd = [sys.executable, home/'script.py', *(f'{t}={o}' for t,o in models.items()), '--base', base,
        '--data', *(f'{t}={o}' for t,o in data.items()), '--out', home/'by_command', '--text', 'mood=snippet', '--label', 'mood=verdict', 'topic=code', '--budget', '2s']
    p = subprocess.run([*map(str, cmd)], capture_output=True, text=True)
    assert not p.returncode and 'Plain averaging fails' in p.stdout and (home/'by_command'/'report.md').is_file(), p.stderr
    p = subprocess.run([*map(str, cmd)], capture_output=True, text=True)
    assert p.returncode==1 and 'is not empty' in p.stderr and len(p.stderr.strip().splitlines())==1

def test_three(close, home):
    "N models; what is for two is not tried"
    models,base,data = close
    said = []
    table = compare(models | dict(again=models['mood']), base, data | dict(again=data['mood']), home/'three', budget='15s', say=said.append)
    assert {'mood','topic','again'} <= {*table} and not {'SLERP','snr_lowA'} & {*table.row}
    assert any('mood and again hold the same numbers' in o for o in said)
    assert load_model(home/'three'/'merged', 'again').num_labels==3

def test_ragged_tables(tmp_path):
    "A comma in a text without quotes would move cells: refused; a lone quote between tabs is a quote"
    f = tmp_path/'a.csv'
    f.write_text('label,text\npos,hello, world\n')
    with pytest.raises(ValueError, match='row 1 .* has 3 cells'): read_table(f)
    f = tmp_path/'a.tsv'
    f.write_text('text\tlabel\n"so it began\tpos\nend"\tneg\n')
    assert read_table(f)==dict(text=['"so it began','end"'], label=['pos','neg'])

def test_parts(tmp_path):
    "Rows without a label are for repairs; a text that repeats is in one part; no more rows than are needed"
    f = tmp_path/'a.csv'
    pd.DataFrame(dict(t=[f'some text {i%3000}' for i in range(6000)], y=[('', 'a', 'b')[i%3] for i in range(6000)])).to_csv(f, index=False)
    found = own_data('x', f, ['a','b'], text='t', label='y')
    assert (found.truth('inputs')==-1).all() and len(found['inputs'])==500 and len(found['test'])==2000
    assert not {*found['test']} & {*found['tune'], *found['inputs']}
    assert (found.truth('test')>=0).all() and 'more are not used' in found.said
    assert own_data('x', f, ['a','b'], seed=1).parts['test'].tolist()!=found.parts['test'].tolist()

def test_not_even_the_references_fit(apart, home, monkeypatch):
    "Where asking takes longer than the budget, that is said before anything is asked"
    monkeypatch.setattr(classifiers.Classifiers, 'pace', lambda self, tasks: 100.)
    refused(apart, home, 'take about 5.0 min to answer 600 rows each: pass --budget 10m', budget='2m', seed=9)

def test_a_row_that_takes_too_long(apart, home, monkeypatch):
    "It is given up and named; the best of the others is written"
    kept = [o for o in candidates.comparison(2) if o.name in ('ridge mean','TIES')]
    monkeypatch.setattr(module, 'comparison', lambda *a: kept)
    real = candidates.Bench.merged
    def merged(self, row, *a):
        if row.name=='TIES': raise candidates.TooLate
        return real(self, row, *a)
    monkeypatch.setattr(candidates.Bench, 'merged', merged)
    table = compare(*apart, home/'late', budget='5m', seed=4, say=lambda o: None)
    assert 'ridge mean' in {*table.row} and 'TIES' not in {*table.row}
    assert '- TIES: given up after' in (home/'late'/'report.md').read_text()
