"""Many prompts at once on asyncio, each text printed when it is finished; a busy server is asked again."""

import asyncio
from pathlib import Path

from steer_client import AsyncSteerClient, SamplingParams

AT_ONCE = 4


async def main() -> None:
    """Asks for a steered text of every prompt, `AT_ONCE` at a time."""
    prompts = Path(__file__).with_name("prompts.txt").read_text(encoding="utf-8").splitlines()
    turn = asyncio.Semaphore(AT_ONCE)
    async with AsyncSteerClient(timeout=600) as client:

        async def ask(prompt: str) -> str:
            async with turn:
                text = await client.generate(prompt, operators="ocean=0.4", sampling=SamplingParams(max_tokens=16))
                return f"{prompt}{text.text}"

        for finished in asyncio.as_completed([ask(prompt) for prompt in prompts]):
            print(await finished)


asyncio.run(main())
