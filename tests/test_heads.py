"What belongs to a task, over the architectures of transformers: bodies are shared, heads are kept, results load whole."
import json, pytest, subprocess, sys
from pathlib import Path
import torch, transformers as t
from spectrum_merging.checkpoint import Checkpoint
from spectrum_merging.heads import find_heads
from spectrum_merging.merge import load_model, merge
from spectrum_merging.plan import make_plan

scripts = Path(sys.executable).parent
text = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, vocab_size=60, max_position_embeddings=40,
    pad_token_id=0)
decoder = text | dict(num_key_value_heads=2)
image = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, image_size=32, patch_size=16)
speech = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, conv_dim=(16, 16), conv_kernel=(3, 3),
    conv_stride=(2, 2), num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, classifier_proj_size=16, num_feat_extract_layers=2)
both = dict(d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48,
    decoder_ffn_dim=48, vocab_size=60, max_position_embeddings=40, pad_token_id=0, eos_token_id=2)

# Class, configuration; bodies are exactly what transformers keeps under base_model_prefix.
tasks = {
    'BertForSequenceClassification': text, 'RobertaForSequenceClassification': text, 'CamembertForSequenceClassification': text,
    'XLMRobertaForSequenceClassification': text, 'AlbertForSequenceClassification': text | dict(embedding_size=16),
    'DistilBertForSequenceClassification': dict(dim=32, n_layers=1, n_heads=4, hidden_dim=48, vocab_size=60, max_position_embeddings=40),
    'DebertaForSequenceClassification': text | dict(pooler_hidden_size=32),
    'DebertaV2ForSequenceClassification': text | dict(pooler_hidden_size=32),
    'ElectraForSequenceClassification': text | dict(embedding_size=16), 'MPNetForSequenceClassification': text,
    'XLNetForSequenceClassification': dict(d_model=32, n_layer=1, n_head=4, d_inner=48, vocab_size=60),
    'ConvBertForSequenceClassification': text | dict(embedding_size=32), 'FNetForSequenceClassification': text,
    'BigBirdForSequenceClassification': text | dict(attention_type='original_full'), 'LayoutLMForSequenceClassification': text,
    'BertForTokenClassification': text, 'BertForQuestionAnswering': text, 'DistilBertForQuestionAnswering':
        dict(dim=32, n_layers=1, n_heads=4, hidden_dim=48, vocab_size=60, max_position_embeddings=40),
    'GPT2ForSequenceClassification': dict(n_embd=32, n_layer=1, n_head=4, vocab_size=60, n_positions=40, pad_token_id=0),
    'LlamaForSequenceClassification': decoder, 'MistralForSequenceClassification': decoder, 'Qwen2ForSequenceClassification': decoder,
    'GemmaForSequenceClassification': decoder | dict(head_dim=8), 'MixtralForSequenceClassification': decoder | dict(num_local_experts=2),
    'OPTForSequenceClassification': dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, ffn_dim=48, vocab_size=60,
        max_position_embeddings=40, word_embed_proj_dim=32, pad_token_id=0),
    'BloomForSequenceClassification': dict(hidden_size=32, n_layer=1, n_head=4, vocab_size=60, pad_token_id=0),
    'BartForSequenceClassification': both, 'MBartForSequenceClassification': both,
    'T5ForSequenceClassification': dict(d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, vocab_size=60, pad_token_id=0,
        eos_token_id=2, decoder_start_token_id=0),
    'ViTForImageClassification': image, 'DeiTForImageClassification': image, 'BeitForImageClassification': image,
    'Dinov2ForImageClassification': image, 'ConvNextForImageClassification': dict(hidden_sizes=[16, 32], depths=[1, 1], num_stages=2),
    'ResNetForImageClassification': dict(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type='basic'),
    'SwinForImageClassification': dict(embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4, image_size=32, patch_size=4),
    'MobileNetV2ForImageClassification': dict(depth_multiplier=.35, image_size=32),
    'Wav2Vec2ForSequenceClassification': speech, 'HubertForSequenceClassification': speech, 'WavLMForSequenceClassification': speech,
}

def net(name, seed, **how):
    cls = getattr(t, name)
    torch.manual_seed(seed)
    return cls(cls.config_class(**(tasks[name] | how))).eval()

def inputs(m):
    g = torch.Generator().manual_seed(0)
    if m.main_input_name=='pixel_values': return dict(pixel_values=torch.randn(2, 3, 32, 32, generator=g))
    if m.main_input_name=='input_values': return dict(input_values=torch.randn(2, 400, generator=g))
    ids = torch.randint(5, 60, (2, 8), generator=g)
    ids[:,-1] = 2
    return dict(input_ids=ids) | (dict(decoder_input_ids=ids) if m.config.is_encoder_decoder and 'Classif' not in type(m).__name__ else {})

def answers(m):
    with torch.no_grad(): out = m(**inputs(m))
    return [out[k] for k in ('logits','start_logits','end_logits') if out.get(k) is not None]

def in_body(m, name):
    "Whether transformers keeps a tensor under the base model; files may call what is in it otherwise than the module"
    return name.startswith(m.base_model_prefix+'.')

@pytest.mark.parametrize('name', tasks)
def test_body_is_the_base_model(name, tmp_path):
    "From a module and from its folder: exactly the base model is shared"
    m = net(name, 0)
    m.save_pretrained(tmp_path/'m')
    for src in (m, tmp_path/'m'):
        ck = Checkpoint(src)
        plan = make_plan('standard', dict(x=src, y=src))
        shared = {k for k in plan.table.name if '@' not in k}
        assert shared=={k for k in ck if in_body(m, k)}, find_heads(ck)

@pytest.mark.parametrize('name', tasks)
def test_each_expert_answers_as_before(name, tmp_path):
    "Two experts with one body: each task of the merge is its expert, from its folder, the root, and `load_model`"
    x,y = net(name, 0),net(name, 1)
    y.load_state_dict(y.state_dict() | {k: v for k,v in x.state_dict().items() if in_body(x, k)})
    paths = {k: tmp_path/k for k in 'xy'}
    for k,m in dict(x=x, y=y).items(): m.save_pretrained(paths[k])
    out = merge(make_plan('standard', paths), paths, out=tmp_path/'out')
    cls = type(x)
    for k,m,places in (('x', x, [out, out/'heads'/'x']), ('y', y, [out/'heads'/'y'])):
        for at in places:
            got,info = cls.from_pretrained(at, output_loading_info=True)
            assert not any(info[o] for o in ('missing_keys','unexpected_keys','mismatched_keys')), (at, info)
            for a,b in zip(answers(got.eval()), answers(m)): torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
        for a,b in zip(answers(load_model(out, k)), answers(m)): torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)

@pytest.mark.parametrize('name', tasks)
def test_runs_of_one_task_make_a_soup(name, tmp_path):
    "Without names and with the same labels heads are averaged; a model merged with itself is itself, bit for bit"
    m = net(name, 0)
    m.save_pretrained(tmp_path/'a')
    plan = make_plan('standard', [tmp_path/'a', tmp_path/'a'])
    assert any('runs of one task' in o for o in plan.meta['notes'])
    out = merge(plan, [tmp_path/'a', tmp_path/'a'], out=tmp_path/'out')
    got,info = type(m).from_pretrained(out, output_loading_info=True)
    assert not any(info[o] for o in ('missing_keys','unexpected_keys','mismatched_keys')), info
    want = m.state_dict()
    assert [k for k,v in got.state_dict().items() if not v.equal(want[k])]==[]

def test_what_the_command_says(tmp_path):
    "First line: what was decided about heads; last lines: how each task is loaded"
    for k,n in dict(a=2, b=2, c=5).items(): net('DistilBertForSequenceClassification', n+ord(k), num_labels=n).save_pretrained(tmp_path/k)
    def run(*a):
        p = subprocess.run([scripts/'spectrum-merge', *a], cwd=tmp_path, capture_output=True, text=True)
        assert not p.returncode, p.stderr
        return p.stdout.splitlines()
    soup,many = run('a', 'b', '--out', 'o1'),run('mood=a', 'my-topic=c', '--out', 'o2')
    assert 'runs of one task' in soup[0] and "from_pretrained('o1')" in soup[-1]
    assert 'pre_classifier' in many[0] and 'per task' in many[0]
    assert "from_pretrained('o2')" in many[-2] and "'o2/heads/my-topic'" in many[-1]
    said = (tmp_path/'o2'/'README.md').read_text()
    assert 'heads/my-topic' in said and 'pre_classifier' in said
    assert load_model(tmp_path/'o2', 'my-topic').config.num_labels==5
    with pytest.raises(KeyError, match='mood'): load_model(tmp_path/'o2')

def test_load_model_needs_a_class(tmp_path):
    "A folder that does not name its class is refused with the remedy"
    for k in 'ab': torch.save({'w': torch.randn(4, 4)}, tmp_path/f'{k}.bin')
    out = merge(make_plan('standard', [tmp_path/'a.bin', tmp_path/'b.bin']), [tmp_path/'a.bin', tmp_path/'b.bin'], out=tmp_path/'out')
    with pytest.raises(ValueError, match='load_task'): load_model(out)

def test_new_in_the_expert(tmp_path):
    "What the base never had is the task's, also within the body, and strategies that add to the base keep it"
    m = {k: net('BertForSequenceClassification', i) for i,k in enumerate('xy')}
    base = t.BertForMaskedLM(m['x'].config) # without the pooler
    plan = make_plan('task_arithmetic', m, {k: v for k,v in base.state_dict().items()})
    heads = {k.partition('@')[0].rpartition('.')[0] for k in plan.table.name if '@' in k}
    assert heads=={'classifier','bert.pooler.dense'}
    got = merge(plan, m, {k: v for k,v in base.state_dict().items()})
    assert got['classifier.weight@y'].equal(m['y'].state_dict()['classifier.weight'])

@pytest.mark.parametrize('kind', ['GPT2LMHeadModel','LlamaForCausalLM','BertForMaskedLM','T5ForConditionalGeneration'])
def test_language_models_are_merged_whole(kind):
    "Named or not: an output layer over words is no task's"
    cls = getattr(t, kind)
    small = dict(vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48)
    odd = {'GPT2LMHeadModel': dict(n_embd=32, n_layer=1, n_head=4, vocab_size=60), 'T5ForConditionalGeneration':
        dict(d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, vocab_size=60)}
    m = cls(cls.config_class(**odd.get(kind, small)))
    plan = make_plan('standard', dict(math=m, code=m))
    assert not any('@' in k for k in plan.table.name)
