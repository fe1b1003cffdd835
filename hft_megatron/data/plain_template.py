"""The chat form of a model whose tokenizer brings no template of its own; the export writes it out with it."""

PLAIN_TEMPLATE = """\
{{- bos_token if bos_token is defined else '' }}
{%- for message in messages %}
{%- if message['role'] == 'assistant' %}
{{- '<|assistant|>\\n' }}{% generation %}{{- message['content'] + eos_token }}{% endgeneration %}
{{- '' if loop.last else '\\n' }}
{%- elif message['role'] in ('system', 'user') %}
{{- '<|' + message['role'] + '|>\\n' + message['content'] + '\\n' }}
{%- else %}{{- raise_exception('the role ' + message['role'] + ' is not one of system, user and assistant') }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{% endif %}
"""
"""For a tokenizer without a template of its own: Tulu's form, whose tags are plain text in any vocabulary."""
