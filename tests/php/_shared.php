<?php
// What every page but hello.php does: names its colour, hands the caller's id back, and notes in the
// journal ($JOURNAL in the pool's environment) that a script began, so that a test can tell a request
// executed twice, or for nobody, from one that never ran. One write of one line is atomic under O_APPEND.

function journal(string $event): void
{
    $file = getenv('JOURNAL');
    if ($file !== false && $file !== '') {
        $id = $_SERVER['HTTP_X_LEDGER_ID'] ?? $_SERVER['HTTP_X_REQUEST_ID'] ?? '-';
        $line = $event . ' ' . $id . ' ' . $_SERVER['REQUEST_METHOD'] . ' ' . getmypid() . "\n";
        file_put_contents($file, $line, FILE_APPEND);
    }
}

/** Length and SHA-1 of the request body, read in pieces: a large body must not meet memory_limit. */
function body_digest(): array
{
    $sha1 = hash_init('sha1');
    $length = 0;
    $input = fopen('php://input', 'rb');
    while (!feof($input)) {
        $piece = fread($input, 65536);
        if ($piece === false || $piece === '') {
            break;
        }
        $length += strlen($piece);
        hash_update($sha1, $piece);
    }
    return ['length' => $length, 'sha1' => hash_final($sha1)];
}

/** Waits on a socket that nobody writes to: unlike sleep() a signal does not end it early, and it burns no CPU. */
function wait_on_socket(int $ms): void
{
    [$ours, $theirs] = stream_socket_pair(STREAM_PF_UNIX, STREAM_SOCK_STREAM, STREAM_IPPROTO_IP);
    $end = hrtime(true) + $ms * 1000000;
    while (($left = intdiv($end - hrtime(true), 1000)) > 0) {
        $read = [$ours];
        $none = null;
        @stream_select($read, $none, $none, intdiv($left, 1000000), $left % 1000000);
    }
    fclose($theirs);
}

header('X-Colour: ' . getenv('COLOUR'));
if (isset($_SERVER['HTTP_X_LEDGER_ID'])) {
    header('X-Ledger-ID: ' . $_SERVER['HTTP_X_LEDGER_ID']);
}
journal('begin');
register_shutdown_function(static fn () => journal('end'));
