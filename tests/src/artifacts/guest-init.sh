#!/bin/sh
# Init of the guest's initramfs: loads the drivers, then hands over to the root file system on the disk that
# the command line names, or gives a shell where it names none.
echo "ozone-guest: init"

/bin/mount -t proc proc /proc
/bin/mount -t sysfs sysfs /sys
/bin/mount -t devtmpfs devtmpfs /dev
export PATH=/bin HOME=/ TERM=linux

while read -r module; do
    insmod "/modules/$module"
done < /modules/order

root= mode=rw init=shell console=ttyS0
for word in $(cat /proc/cmdline); do
    case $word in
        root=*) root=${word#root=} ;;
        ro) mode=ro ;;
        ozone.init=*) init=${word#ozone.init=} ;;
        console=*) console=${word#console=}; console=${console%%,*} ;;
    esac
done

# Waits until the file $1 is there, at most ten seconds.
await() {
    tries=0
    while [ ! -e "$1" ] && [ $tries -lt 200 ]; do
        usleep 50000
        tries=$((tries + 1))
    done
    [ -e "$1" ] || echo "ozone-guest: no $1"
}

await "/dev/$console"
[ -e "/dev/$console" ] || console=ttyS0

case $init in
    poweroff) poweroff -f ;;
    reboot) reboot -f ;;
    panic) echo c > /proc/sysrq-trigger ;;
esac

if [ -n "$root" ]; then
    await "$root"
    if mount -t ext4 -o "$mode" "$root" /root; then
        mount --move /dev /root/dev
        mount --move /sys /root/sys
        mount --move /proc /root/proc
        exec switch_root /root /sbin/init
    fi
    echo "ozone-guest: cannot mount $root"
fi

exec < "/dev/$console" > "/dev/$console" 2>&1
case $init in
    commands)
        stty -echo
        echo "ozone-guest: ready"
        while read -r line; do eval "$line"; status=$?; done
        ;;
    *) setsid -c sh ;;
esac
poweroff -f
