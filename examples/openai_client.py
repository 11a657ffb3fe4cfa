"""OpenAI's own client, steered: by the model's name, and by extra_body. The server needs --http-port 8000."""

import os

from openai import OpenAI

client = OpenAI(base_url=os.environ.get("STEER_HTTP", "http://127.0.0.1:8000/v1"), api_key="unused")
model = client.models.list().data[0].id

for name in (model, f"{model}+ocean=0.4"):
    answer = client.completions.create(model=name, prompt="The view from the window was", max_tokens=24, temperature=0)
    print(f"{name}: {answer.choices[0].text}")

stream = client.completions.create(
    model=model,
    prompt="The view from the window was",
    max_tokens=24,
    temperature=0,
    stream=True,
    extra_body={"steering": {"operators": ["ocean=0.4"]}},
)
for piece in stream:
    for choice in piece.choices:
        print(choice.text, end="")
        if choice.finish_reason:
            print("\nreceipts:", choice.model_extra["steering"]["receipts"])
