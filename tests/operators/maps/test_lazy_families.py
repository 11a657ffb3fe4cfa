"""A table needs transformers' module of its own family only, and no other one is imported to find it."""

import subprocess
import sys

PROGRAM = """
import sys
from transformers import Qwen2Config, Qwen2ForCausalLM
from dataclasses import replace
from operators.maps.detach import families, family_of, register

def modules():
    return sorted(name.rpartition(".")[2] for name in sys.modules if ".models." in name and ".modeling_" in name)

model = Qwen2ForCausalLM(Qwen2Config(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                     num_attention_heads=2, num_key_value_heads=1)).eval()
family = family_of(model)
try:
    register(replace(next(each for each in families() if each.name == "qwen2"), name="mine"))
except ValueError as error:
    print(error)
print(family.name, modules())
"""


# ``modeling_auto`` is no model: it is the table of names that transformers looks its own up in.
def test_only_the_module_of_the_models_own_class_is_imported():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "Qwen2ForCausalLM has a detach table already; a table cannot be replaced",
        "qwen2 ['modeling_auto', 'modeling_qwen2']",
    ]
