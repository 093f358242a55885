"""The text from which the demo model's tokenizer learns its merges."""

CORPUS = """\
A red square stands left of a blue circle, and a small green triangle lies below both of them.
How many animals are there in the picture? There are three dogs, two cats and one brown horse.
What color is the flower in the middle of the image? The petals are yellow, orange and purple.
Please describe this photograph in one short sentence. Answer with a single word or a number.
An old temple with a curved roof stands on a hill above the trees, under a cloudy evening sky.
The woman in the white dress holds an umbrella while the man beside her is reading a newspaper.
Where is the bicycle? The bicycle leans against the brick wall, next to the wooden front door.
Two children are playing football on the grass near the river; behind them we see a stone bridge.
Is the traffic light green or red? It is red, so every car and bus has stopped at the crossing.
The kitchen table carries a bowl of apples, a loaf of bread, four plates and a glass of water.
Which object is the largest one? The largest object in this scene is the airplane on the runway.
A train crosses the snowy mountains in winter; black smoke rises from its engine into the air.
Read the words written on the sign. The sign says: open from Monday to Friday, nine until six.
What is the weather like? It is sunny with a few clouds, a light wind, and the sea is very calm.
The chart shows that sales increased from twelve percent in January to thirty percent in June.
Count the windows of the house. The house has five windows upstairs and seven windows downstairs.
A young boy wearing glasses and a striped shirt is looking through a telescope at the full moon.
Compare the first image with the second image and explain what has changed between the two views.
The bird with long legs walks through shallow water and catches a fish with its sharp yellow beak.
Who is standing behind the counter? A baker with a white hat is selling cakes to some customers.
On the shelf there are books, candles, a clock, an empty bottle, and a framed black and white map.
The street is crowded with people, market stalls, motorcycles, and bright lamps hanging overhead.
Does the person hold a phone, a camera, a guitar, a ball, a knife, a pencil, a key, or a basket?
Left, right, top, bottom, center, corner, inside, outside, above, under, between, around, across.
Zero one two three four five six seven eight nine ten eleven twelve 0 1 2 3 4 5 6 7 8 9 10 11 12.
USER: <image> What can you see here? ASSISTANT: I can see a garden with roses, bees and a fountain.
SYSTEM: You are a helpful assistant that looks at images carefully and answers every question.
"""
