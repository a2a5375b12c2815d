"""Load on a server that speaks OpenAI's language, sent when it is due and not when the server has time for it.

Read `bench`: it plans (`arrivals`, `workload`), sends (`generate`, `client`, `wire`), measures (`record`, `measure`) and
looks for the highest rate (`search`). Free of torch.
"""
