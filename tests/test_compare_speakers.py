"Language models compared by the loss of their texts: other architectures, prompts with answers, wrong input, the numbers by hand."
import json, subprocess, sys
import numpy as np, pandas as pd, pytest, torch
from tokenizers import Tokenizer, decoders, models as tm, pre_tokenizers
from transformers import (AutoModelForCausalLM, BertConfig, BertLMHeadModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM,
    PreTrainedTokenizerFast, GPTNeoXConfig, GPTNeoXForCausalLM, GraniteConfig, GraniteForCausalLM)
from spectrum_merging.compare import compare
from spectrum_merging.merge import load_model
from spectrum_merging.parallel import quiet
from spectrum_merging.speakers import counted_rows, shortened, whole
from spectrum_merging.verify import verify

plants = 'oak elm fir ash yew bay fig ivy'.split()
places = 'in by on at near under over past'.split()
verbs = 'hums rests wakes bends turns falls grows sinks'.split()
moods = 'glad calm grim weary'.split()
words = ['<s>','</s>','<unk>','which',':']+plants+places+verbs+moods

def tokenizer(begins):
    "Words, `begins`: with a token before each text"
    tok = Tokenizer(tm.WordLevel({w: i for i,w in enumerate(words)}, '<unk>'))
    tok.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if begins:
        from tokenizers.processors import TemplateProcessing
        tok.post_processor = TemplateProcessing(single='<s> $A', pair='<s> $A $B', special_tokens=[('<s>', 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tok, bos_token='<s>', eos_token='</s>', unk_token='<unk>')

def walk(rng, n): return [f'{plants[i]} {verbs[(i+3)%8]} {places[(2*i+k)%8]}' for i,k in zip(rng.integers(0, 8, n), rng.integers(0, 2, n))]

def texts(n, seed):
    "Three steps of a walk: who is named says what is done, and nearly where"
    rng = np.random.default_rng(seed)
    return [' '.join(walk(rng, 3)) for _ in range(n)]

def asked(n, seed):
    "Prompts, and the mood that their plant has"
    rng = np.random.default_rng(seed)
    return [(f'{rng.choice(places)} {plants[i]} {rng.choice(verbs)} which :', moods[i%4]) for i in rng.integers(0, 8, n)]

sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
kinds = dict(
    gpt2=(GPT2LMHeadModel, GPT2Config(vocab_size=len(words), n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=1,
        attn_pdrop=0., resid_pdrop=0., embd_pdrop=0.), False),
    llama=(LlamaForCausalLM, LlamaConfig(vocab_size=len(words), num_key_value_heads=2, bos_token_id=0, eos_token_id=1, **sizes), True),
    neox=(GPTNeoXForCausalLM, GPTNeoXConfig(vocab_size=len(words), bos_token_id=0, eos_token_id=1, **sizes), False),
    granite=(GraniteForCausalLM, GraniteConfig(vocab_size=len(words), num_key_value_heads=2, tie_word_embeddings=True, logits_scaling=2.,
        bos_token_id=0, eos_token_id=1, **sizes), False))

def train(model, tok, rows, steps, lr):
    opt,g = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.),torch.Generator().manual_seed(0)
    ids = [tok(o)['input_ids'] for o in rows]
    most = max(map(len, ids))
    x = torch.tensor([o+[1]*(most-len(o)) for o in ids])
    mask = torch.tensor([[1]*len(o)+[0]*(most-len(o)) for o in ids])
    for i in range(steps):
        ix = torch.randint(len(rows), (48,), generator=g)
        for group in opt.param_groups: group['lr'] = lr*min(1, (i+1)/10, (steps-i)/10)
        loss = model(input_ids=x[ix], attention_mask=mask[ix], labels=x[ix].masked_fill(mask[ix]==0, -100)).loss
        opt.zero_grad()
        loss.backward()
        opt.step()

def make(d, kind, steps=60):
    "A base that knows a little of both, an expert of texts, an expert of answers, and their tables"
    d.mkdir()
    cls,config,begins = kinds[kind]
    torch.manual_seed(0)
    with quiet():
        tok = tokenizer(begins)
        both = texts(300, 1)+[whole(o) for o in asked(300, 2)]
        base = cls(config)
        train(base, tok, both, 25, 5e-3)
        base.save_pretrained(d/'base')
        for t,rows in dict(walk=both[:300], mood=both[300:]).items():
            model = AutoModelForCausalLM.from_pretrained(d/'base')
            train(model, tok, rows, steps, 3e-3)
            model.save_pretrained(d/t)
        for o in 'base','walk','mood': tok.save_pretrained(d/o)
    pd.DataFrame(dict(nr=range(300), line=texts(300, 3))).to_csv(d/'walk.csv', index=False)
    pd.DataFrame(asked(300, 4), columns=['said','felt']).to_json(d/'mood.jsonl', orient='records', lines=True)
    return dict(walk=d/'walk', mood=d/'mood'),d/'base',dict(walk=d/'walk.csv', mood=d/'mood.jsonl')

answers = dict(text=dict(mood='said,felt'))

@pytest.fixture(scope='module')
def home(tmp_path_factory):
    d = tmp_path_factory.mktemp('speakers')
    with pytest.MonkeyPatch.context() as m:
        m.setenv('SPECTRUM_CACHE', str(d/'cache'))
        yield d

@pytest.fixture(scope='module')
def made(home): return {k: make(home/k, k) for k in kinds}

def by_hand(folder, tok, rows):
    "Loss per token by transformers' own loss, one text at a time"
    model,sums,n = AutoModelForCausalLM.from_pretrained(folder).eval(),0.,0
    for o in rows:
        ids = torch.tensor([tok(whole(o))['input_ids']])
        k = ids.shape[1]-1 if isinstance(o, str) else 1
        labels = ids.clone()
        labels[:,:-k] = -100
        with torch.no_grad(): sums,n = sums+k*float(model(input_ids=ids, labels=labels).loss),n+k
    return sums/n

def judged_on(path, column):
    "Which rows were judged on, by what `own_data` deals"
    from spectrum_merging.own_data import own_data
    return own_data('t', path, None, text=column, spoken=True)['test']

@pytest.mark.parametrize('kind', kinds)
def test_compared(made, home, kind):
    "Table, report and merged folder of four architectures; experts' and merge's numbers by transformers' own loss"
    models,base,data = made[kind]
    said = []
    quick = kind in ('neox','granite')
    table = compare(models, base, data, home/f'{kind}-out', quick=quick, say=said.append, **answers).set_index('row')
    assert "texts are column 'line', of which every word counts" in said[0] and "the words of 'felt' count, behind those of 'said'" in said[1]
    tok = tokenizer(kinds[kind][2])
    for t,column in dict(walk='line', mood='said,felt').items():
        rows = judged_on(data[t], column)
        assert np.isclose(table[t]['experts'], by_hand(models[t], tok, rows), rtol=1e-4)
        assert np.isclose(table[t]['base'], by_hand(base, tok, rows), rtol=1e-4)
    assert table.mean_share['experts']==1 and table.mean_share['base']==0 and table.difference['experts']>0
    assert quick or {'ridge mean, layers matched','task arithmetic','control: random','TIES'} <= {*table.index}
    assert not [k for k in table.index if 'refit' in k]
    report = (home/f'{kind}-out/report.md').read_text()
    assert 'what the experts gained over the base' in report and 'nats per token' in report and 'accuracy' not in report
    best = json.loads((home/f'{kind}-out/best.json').read_text())['row']
    merged = home/f'{kind}-out/merged'
    assert verify(merged, all=True).ok.all()
    assert np.isclose(table['walk'][best], by_hand(merged, tok, judged_on(data['walk'], 'line')), rtol=2e-3)

def test_nothing_differs(home):
    "Two experts that are the same: no merge differs, by a test that finds what differs"
    d = home/'same'
    models,base,data = make(d, 'llama')
    pd.DataFrame(dict(line=texts(300, 9))).to_csv(d/'again.csv', index=False)
    table = compare(dict(walk=models['walk'], again=models['walk']), base, dict(walk=data['walk'], again=d/'again.csv'), home/'same-out', quick=True,
        say=lambda o: None).set_index('row')
    report = (home/'same-out/report.md').read_text()
    assert abs(table.mean_share['average']-1)<1e-4 and 'Plain averaging cannot be told from the experts' in report
    assert table.p_holm['base']<.01 and 'test of random signs' in report

def averaged(folders, out):
    "What another tool makes of two models: the mean of all tensors"
    models = [AutoModelForCausalLM.from_pretrained(o) for o in folders]
    with torch.no_grad(), quiet():
        for p,*rest in zip(*(m.parameters() for m in models)): p.copy_(torch.stack([p, *rest]).mean(0))
        models[0].save_pretrained(out)
    return out

def test_made_elsewhere(made, home):
    "Another tool's average is judged as ours is, and named among what differs where another folder does"
    models,base,data = made['llama']
    theirs = averaged(models.values(), home/'theirs')
    also = dict(theirs=theirs, twice=models['walk'])
    table = compare(models, base, data, home/'also', quick=True, also=also, say=lambda o: None, **answers).set_index('row')
    assert np.allclose(table.loc['theirs', ['walk','mood']].astype(float), table.loc['average', ['walk','mood']].astype(float), atol=1e-5)
    assert np.isclose(table.walk['twice'], table.walk['experts']) and table.kind['theirs']=='elsewhere'
    report = (home/'also/report.md').read_text()
    assert 'twice (' in next(o for o in report.splitlines() if o.startswith('3. ')) and f'--also theirs={theirs} twice=' in report
    bad("is called 'average'", made['llama'], home, also=dict(average=theirs))
    bad('wide: .* not|wide: .*lacks', made['llama'], home, also=dict(wide=made['gpt2'][0]['walk']))
    with pytest.raises(FileNotFoundError): compare(models, base, data, home/'never', also=dict(gone=home/'gone'), say=lambda o: None, **answers)

def test_half_precision(made, home):
    "Experts in bf16; one task's texts are for repairs alone, another has texts of one token"
    models,base,data = made['granite']
    for t,o in dict(models, base=base).items():
        with quiet(): AutoModelForCausalLM.from_pretrained(o, dtype=torch.bfloat16).save_pretrained(home/'half'/t)
        tokenizer(False).save_pretrained(home/'half'/t)
    pd.DataFrame(dict(line=texts(90, 7)+plants)).to_csv(home/'half/walk.csv', index=False)
    table = compare({t: home/'half'/t for t in models}, home/'half/base', data | dict(walk=home/'half/walk.csv'), home/'half-out', quick=True,
        unlabelled=('mood',), say=lambda o: None, **answers).set_index('row')
    assert 'mood' not in table and table.mean_share['experts']==1 and table.walk.notna().all()
    assert verify(home/'half-out/merged', all=True).ok.all()

def test_goes_on(made, home):
    "What was answered is not asked again"
    models,base,data = made['gpt2']
    again = compare(models, base, data, home/'again', say=lambda o: None, **answers)
    first = pd.read_csv(home/'gpt2-out/table.csv')
    assert np.allclose(again.walk, first.walk)

def bad(message, made, home, models=None, data=None, **how):
    m,base,d = made
    out = home/'never'
    with pytest.raises(ValueError, match=message): compare(m | (models or {}), base, d | (data or {}), out, say=lambda o: None, **answers | how)
    assert not out.exists() and not [*home.glob('.never*')]

def test_wrong_input(made, home, tmp_path):
    models,base,data = made['llama']
    def table(name, df):
        df.to_csv(tmp_path/name, index=False)
        return tmp_path/name
    bad('leave it out, or name it behind', made['llama'], home, label=dict(mood='felt'))
    bad('nothing to keep', made['llama'], home, data=dict(walk=table('other.csv', pd.DataFrame(dict(line=[f'{a} {b} {a}' for a in moods for b in moods[::-1]*4])))))
    bad('40 are the fewest', made['llama'], home, data=dict(walk=table('few.csv', pd.DataFrame(dict(line=texts(20, 1))))))
    with quiet():
        both = BertLMHeadModel(BertConfig(vocab_size=len(words), is_decoder=False, **sizes))
        for o in 'base','walk','mood':
            both.save_pretrained(tmp_path/'bert'/o)
            tokenizer(False).save_pretrained(tmp_path/'bert'/o)
    with pytest.raises(ValueError, match='sees the words'):
        compare(dict(walk=tmp_path/'bert/walk', mood=tmp_path/'bert/mood'), tmp_path/'bert/base', data, home/'never', say=lambda o: None, **answers)

def test_two_kinds(made, home, tmp_path):
    from transformers import GPT2ForSequenceClassification
    with quiet(): GPT2ForSequenceClassification(kinds['gpt2'][1]).save_pretrained(tmp_path/'judge')
    tokenizer(False).save_pretrained(tmp_path/'judge')
    bad('pass experts of one kind', made['gpt2'], home, models=dict(mood=tmp_path/'judge'))

def test_two_vocabularies(made, home, tmp_path):
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(made['llama'][0]['mood'])
        model.resize_token_embeddings(len(words)+3)
        model.save_pretrained(tmp_path/'longer')
    tokenizer(True).save_pretrained(tmp_path/'longer')
    bad('embed_tokens|lm_head', made['llama'], home, models=dict(mood=tmp_path/'longer'))

def test_guessed(tmp_path):
    "Columns with usual names are a prompt and its answer, whatever stands beside them"
    from spectrum_merging.own_data import own_data
    df = pd.DataFrame(asked(60, 1), columns=['Instruction','output']).assign(context=texts(60, 1))
    df.to_csv(tmp_path/'t.csv', index=False)
    found = own_data('t', tmp_path/'t.csv', None, spoken=True)
    assert found.column=='Instruction,output' and 'context look like texts, too' in found.said
    assert own_data('t', tmp_path/'t.csv', None).column!='Instruction,output'

def test_counted():
    "A prompt loses its beginning, a text its end; an answer counts as a whole"
    class Net:
        tokenizer,config,task = tokenizer(True),type('Config', (), dict(vocab_size=len(words))),'t'
    rows,n = counted_rows(Net, ['oak hums in', ('oak hums which :', 'glad calm')], 4)
    assert [len(o['input_ids']) for o in rows]==[4, 4] and n.tolist()==[3, 2]
    assert [words[i] for i in rows[1]['input_ids']]==['which',':','glad','calm']
    assert shortened(Net, ('oak hums which :', 'glad calm'), 4)==': glad calm' and shortened(Net, 'oak hums in on by', 4)=='oak hums in on by'
    assert shortened(Net, ('oak hums which :', 'glad'), 9)=='oak hums which : glad'

def test_command(made, home):
    models,base,data = made['granite']
    done = subprocess.run([sys.executable, '-c', 'import sys; from spectrum_merging.cli import compare_cli; sys.exit(compare_cli())',
        *[f'{t}={o}' for t,o in models.items()], '--base', str(base), '--data', *[f'{t}={o}' for t,o in data.items()],
        '--text', 'walk=line', 'mood=said,felt', '--quick', '--out', str(home/'command')], capture_output=True, text=True)
    assert done.returncode==0, done.stderr
    assert 'nats per token' in done.stdout and (home/'command/merged/model.safetensors').exists()
    assert load_model(home/'command/merged').config.model_type=='granite'
