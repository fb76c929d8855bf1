"""Writes expected.json: every template of this folder, rendered by Hugging Face transformers.

    python make_expected.py
"""
import datetime, glob, json, os
import jinja2, transformers
from transformers.utils import chat_template_utils as utils

HERE = os.path.dirname(os.path.abspath(__file__))
# The spellings of the start and end token that a template may ask for.
TOKENS = {
    'headers': ('<|begin_of_text|>', '<|eot_id|>'),
    'inst': ('<s>', '</s>'),
    'alternate': ('<s>', '</s>'),
    'bars': ('<|endoftext|>', '<|endoftext|>'),
}
# What `strftime_now` answers, for the template that asks for it.
DATES = {'language': (2024, 7, 26)}
CONVERSATIONS = {
    'user': [('user', 'Hi')],
    'system': [('system', 'Be brief.'), ('user', 'What is 2+2?')],
    'turns': [('system', 'You are a poet.'), ('user', '  Ä rose\n'), ('assistant', 'Red “petals” <b>&amp;</b>'),
              ('user', 'It\'s 🙂\n\nright?')],
    'think': [('user', 'Hi'), ('assistant', '<think>\nhm\n</think>\n\nHello'), ('user', 'Again'),
              ('assistant', '<think>\nstill\n</think>\n\nYes')],
    'result': [('user', 'How warm?'), ('assistant', '<think>\nask\n\n</think>\ncall'),
               ('user', '<result>21</result>'), ('assistant', '\n<think>21</think>\n\n21 degrees\n')],
    'tail': [('user', 'a'), ('assistant', 'b')],
    'two_users': [('user', 'a'), ('user', 'b')],
    'other_role': [('tool', '{"x": 1}'), ('user', 'ok')],
    'skip': [('user', '1'), ('skip', '2'), ('assistant', '3'), ('user', '4'), ('assistant', '5')],
    'empty_text': [('user', '')],
}


def render(name, messages, add_generation_prompt):
    with open(f'{HERE}/{name}.jinja', encoding='utf-8') as f:
        source = f.read()
    bos, eos = TOKENS.get(name, (None, None))
    tokens = {k: v for k, v in (('bos_token', bos), ('eos_token', eos)) if v is not None}
    case = dict(add_generation_prompt=add_generation_prompt, bos_token=bos, eos_token=eos)
    if name in DATES:
        case['date'] = DATES[name]
        date = datetime.date(*DATES[name])
        utils._compile_jinja_template(source).globals['strftime_now'] = date.strftime
    try:
        texts, _ = utils.render_jinja_template([messages], chat_template=source,
                                               add_generation_prompt=add_generation_prompt, **tokens)
        case['expected'] = texts[0]
    except jinja2.exceptions.TemplateError as e:
        case['refused'] = e.message
    return case


names = sorted(os.path.basename(p)[:-len('.jinja')] for p in glob.glob(f'{HERE}/*.jinja'))
conversations = {k: [dict(role=r, content=c) for r, c in v] for k, v in CONVERSATIONS.items()}
cases = [dict(template=name, conversation=key, **render(name, messages, generate))
         for name in names for key, messages in conversations.items() for generate in (False, True)]
with open(f'{HERE}/expected.json', 'w', encoding='utf-8') as f:
    made_with = f'transformers {transformers.__version__} render_jinja_template, Jinja2 {jinja2.__version__}'
    json.dump(dict(made_with=made_with, conversations=conversations, cases=cases), f, indent=1, ensure_ascii=False)
    f.write('\n')
print(len(cases), 'cases')
