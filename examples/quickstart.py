"""One prompt, plain and steered side by side, with the proof of the steering."""

from steer_client import SamplingParams, SteerClient

with SteerClient() as client:
    sampling = SamplingParams(max_tokens=24, repetition_penalty=1.2)
    result = client.compare("The view from the window was", operators="ocean=0.4", sampling=sampling)
    arm = result.steered["steered"]
    print("plain:  ", result.normal.text)
    print("steered:", arm.generation.text)
    print("added:  ", *(change.text for change in result.normal.diff(arm.generation) if change.kind == "added"))
    for receipt in arm.generation.receipts:
        tokens = receipt.prompt_tokens_steered + receipt.generated_tokens_steered
        print(f"{receipt.operator} {receipt.digest[:15]}…: {tokens} tokens at λ {receipt.mean_strength:.3f}")
